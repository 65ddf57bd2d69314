"""HeadScores: derived columns, verdicts, selection, comparison, shards, files, display."""

import json
import math
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import save as save_arrays
from scipy import stats as scipy_stats
from sklearn.metrics import average_precision_score, roc_auc_score

from interp.agreement import accuracy
from interp.errors import HeadIdError, InputError, RunError, UnknownNameError
from interp.files import jsonable, read_table, write_table
from interp.headid import HeadId
from interp.scores import COLUMNS, HeadScores
from interp.stats import paired_test

NAN = math.nan
HEADS = tuple(HeadId(layer, head) for layer in range(2) for head in range(3))


def make(values, null=0.0, heads=HEADS, **fields) -> HeadScores:
    values = np.array(values, dtype=np.float64)
    if null is not None and not isinstance(null, np.ndarray):
        null = np.full(values.shape, null)
    fields.setdefault("examples", tuple(f"e{i}" for i in range(len(values))))
    return HeadScores("copy", heads, values, null, **fields)


def steady(*scores: float, n: int = 10, **fields) -> HeadScores:
    """Heads with these mean scores and a little spread over n examples."""
    wobble = np.linspace(-0.01, 0.01, n)[:, None]
    return make(np.array(scores) + wobble, **fields)


@pytest.fixture
def table() -> HeadScores:
    return steady(0.9, 0.0, 0.05, 0.5, NAN, -0.2, threshold=0.1)


# columns


def test_columns_follow_from_the_examples(table):
    np.testing.assert_allclose(table.values, [0.9, 0, 0.05, 0.5, NAN, -0.2], atol=1e-12)
    np.testing.assert_array_equal(table.n, [10, 10, 10, 10, 0, 10])
    np.testing.assert_array_equal(table.null, [0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(table.p, paired_test(table.per_example, table.null_per_example))
    defined = ~np.isnan(table.p)
    np.testing.assert_allclose(
        table.q[defined], scipy_stats.false_discovery_control(table.p[defined])
    )
    assert np.isnan(table.q[4])
    inside = defined & (table.ci_lo < table.values) & (table.values < table.ci_hi)
    np.testing.assert_array_equal(inside, defined)


def test_a_verdict_needs_both_evidence_and_size(table):
    none, claim = "no evidence", "copy"
    assert table.verdict.tolist() == [claim, none, none, claim, "undefined", none]
    small = replace(table, threshold=0.04)
    assert small.verdict.tolist() == [claim, none, claim, claim, "undefined", none]
    doubtful = make(np.array([[1.0] * 6, [-0.9] * 6] * 5), threshold=0.01)
    assert (doubtful.values > 0.01).all()
    assert set(doubtful.verdict) == {none}


def test_the_threshold_and_alpha_are_inclusive():
    # Ten equal differences: p is 2**-10 for every head, and so is q.
    flat = make(np.full((10, 6), 0.5), threshold=0.5, alpha=2.0**-10)
    assert set(flat.verdict) == {"copy"}
    assert set(replace(flat, threshold=0.5 + 1e-9).verdict) == {"no evidence"}
    assert set(replace(flat, alpha=2.0**-10 * 0.999).verdict) == {"no evidence"}


def test_few_examples_claim_nothing_and_say_how_many_would_do():
    few = make(np.full((2, 6), 1.0))
    assert set(few.verdict) == {"no evidence"}
    needed = math.ceil(math.log2(6 / 0.05))
    assert few.message.endswith(f"too few to find a single head among 6: that takes {needed}")
    one = np.zeros((needed, 6))
    one[:, 0] = 1.0
    assert make(one).verdict.tolist() == ["copy"] + ["no evidence"] * 5
    assert set(make(one[1:]).verdict) == {"no evidence"}


def test_without_controls_nothing_is_claimed():
    bare = steady(*range(6), null=None)
    assert set(bare.verdict) == {"no evidence"}
    assert np.isnan([bare.null, bare.p, bare.q]).all()
    assert bare.message == "10 of 10 examples gave a score; no controls, so nothing was tested"
    with pytest.raises(InputError, match="needs controls"):
        bare.select()
    assert bare.top(1) == (HEADS[5],)


def test_a_low_score_can_be_the_strong_one():
    effects = steady(-0.9, 0.9, -0.05, 0, 0, NAN, threshold=-0.1, direction="lower")
    assert effects.verdict.tolist() == ["copy"] + ["no evidence"] * 4 + ["undefined"]
    assert effects.top(2) == (HEADS[0], HEADS[2])
    assert effects.select() == (HEADS[0],)
    assert effects.rows()[0]["score"] == pytest.approx(-0.9)
    unbounded = steady(-0.9, 0.9, -0.05, 0, 0, NAN, direction="lower")
    assert unbounded.select() == (HEADS[0], HEADS[2])


def test_when_every_example_failed_everything_is_undefined():
    failures = tuple((f"e{i}", "the answer was wrong") for i in range(16))
    for per_example, examples in [
        (np.zeros((0, 6)), ()),
        (np.full((16, 6), NAN), tuple(f"e{i}" for i in range(16))),
    ]:
        table = make(per_example, examples=examples, failures=failures, threshold=0.1)
        assert set(table.verdict) == {"undefined"}
        expected = "no successful run: 0 of 16 examples gave a score (the answer was wrong)"
        assert table.message == expected
        assert table.top(3) == table.select() == ()
        assert [row["score"] for row in table.rows()] == [None] * 6
        assert expected in repr(table)
        figure = table.plot()
        assert np.isnan(figure.data[0].z).all()


def test_failures_count_as_examples():
    table = steady(1, 1, 1, 1, 1, 1, failures=(("f0", "wrong"), ("f1", "wrong")))
    assert table.message == "10 of 12 examples gave a score"


def test_single_precision_is_kept_and_the_mean_is_double():
    values = np.random.default_rng(0).random((1000, 6), dtype=np.float32)
    table = HeadScores("copy", HEADS, values, None, tuple(map(str, range(1000))))
    assert table.per_example.dtype == np.float32
    np.testing.assert_allclose(table.values, values.astype(np.float64).mean(axis=0), rtol=1e-14)


def test_a_table_cannot_be_changed(table):
    with pytest.raises(FrozenInstanceError):
        table.threshold = 0.0
    with pytest.raises(ValueError, match="read-only"):
        table.per_example[0, 0] = 1.0
    source = np.zeros((2, 6))
    copied = HeadScores("copy", HEADS, source, source, ("a", "b"), extras={"x": source[0]})
    source[:] = 9.0
    assert (copied.values == 0).all()
    assert (copied.null == 0).all()
    assert (copied.column("x") == 0).all()


# bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"examples": ("a",)}, r"a row per example and a column per head, \[1, 6\]; got \[2, 6\]"),
        ({"examples": ("a", "a")}, "examples of copy must be different; 'a' is repeated"),
        ({"heads": HEADS[:5] + HEADS[:1]}, "heads of copy must be different; 'L0H0' is repeated"),
        ({"null": np.zeros((2, 5))}, "null_per_example of copy"),
        ({"direction": "up"}, "'higher' or 'lower'; got 'up'"),
        ({"granularity": "layer"}, "'query' or 'kv'; got 'layer'"),
        ({"alpha": 0.0}, "alpha must lie between 0 and 1"),
        ({"threshold": NAN}, "threshold and range must be numbers"),
        ({"range": (1.0, 0.0)}, "threshold and range must be numbers"),
        (
            {"extras": {"x": np.zeros(5)}},
            r"column 'x' of copy must be \[6\] or \[2, 6\]; got \[5\]",
        ),
        ({"extras": {"x": np.array(["a"] * 6)}}, "column 'x' of copy must hold numbers"),
        ({"extras": {"score": np.zeros(6)}}, "column 'score' of copy is taken"),
        ({"params": {"f": print}}, "params.f must be made of numbers"),
        ({"provenance": {"v": {"x": [object()]}}}, r"provenance.v.x\[0\] must be made of"),
    ],
)
def test_fields_must_fit_together(fields, message):
    with pytest.raises(InputError, match=message):
        make(np.zeros((2, 6)), **fields)


def test_scores_must_be_finite_and_names_free():
    with pytest.raises(InputError, match="finite or NaN"):
        make([[math.inf] * 6])
    with pytest.raises(InputError, match="cannot be called 'undefined'"):
        HeadScores("undefined", HEADS, np.zeros((1, 6)), None, ("a",))


# layout and selection


def test_grid_leaves_gaps_where_there_is_no_head():
    heads = (HeadId(2, 1), HeadId(0, 0), HeadId(1, 3, "vision"))
    table = make([[1.0, 2.0, 3.0]], heads=heads)
    assert table.towers == ("text", "vision")
    expected = np.full((3, 2), NAN)
    expected[2, 1], expected[0, 0] = 1.0, 2.0
    np.testing.assert_array_equal(table.grid(), expected)
    assert table.grid("vision").shape == (2, 4)
    np.testing.assert_array_equal(table.grid(column="n")[2], [NAN, 1])
    with pytest.raises(InputError, match="no tower 'audio'; it has: text, vision"):
        table.grid("audio")


def test_columns_by_name():
    each = np.arange(12.0).reshape(2, 6)
    extras = {"place": np.arange(6), "copying": each}
    table = make(np.zeros((2, 6)), extras=extras)
    np.testing.assert_array_equal(table.column("place"), np.arange(6))
    np.testing.assert_array_equal(table.column("copying"), each.mean(axis=0))
    np.testing.assert_array_equal(table.column("score"), table.values)
    with pytest.raises(UnknownNameError) as caught:
        table.column("scroe")
    assert caught.value.hint == "did you mean score?"


def test_top_ranks_and_skips_undefined(table):
    assert table.top(2) == (HEADS[0], HEADS[3])
    assert table.top(99) == tuple(HEADS[i] for i in (0, 3, 2, 1, 5))
    assert steady(1, 1, 1, 1, 1, 1).top(6) == HEADS
    with pytest.raises(InputError, match="not be negative"):
        table.top(-1)


def test_select_takes_its_own_thresholds(table):
    assert table.select() == (HEADS[0], HEADS[3])
    assert table.select(threshold=0.6) == (HEADS[0],)
    assert table.select(threshold=0.01) == (HEADS[0], HEADS[3], HEADS[2])
    assert table.select(fdr=1e-9) == ()


# agreement


def test_compare_lines_up_the_heads(table):
    order = [3, 0, 5, 4, 2, 1]
    other = make(np.array(table.per_example)[:, order] * 2, heads=tuple(HEADS[i] for i in order))
    found = table.compare(other, k=2)
    assert found.spearman == pytest.approx(1)
    assert found.shared == (HEADS[0], HEADS[3])
    assert (found.overlap.shared, found.overlap.expected) == (2, pytest.approx(4 / 6))
    assert found.overlap.p == pytest.approx(1 / 15)
    np.testing.assert_allclose(found.differences, table.values, atol=1e-12)
    assert "top 2: 2 shared, 0.67 by chance" in repr(found)


def test_compare_measures_disagreement():
    found = steady(0, 1, 2, 3, 4, 5).compare(steady(5, 4, 3, 2, 1, 0), k=3)
    assert found.spearman == pytest.approx(-1)
    assert found.overlap.corrected == pytest.approx(-1)
    np.testing.assert_allclose(found.differences, [5, 3, 1, -1, -3, -5], atol=1e-12)


def test_compare_refuses_other_heads(table):
    fewer = make(np.zeros((3, 5)), heads=HEADS[:5])
    with pytest.raises(InputError, match=r"1 are only in the first .* such as L1H2"):
        table.compare(fewer)
    with pytest.raises(InputError, match="same granularity; got 'query' and 'kv'"):
        table.compare(replace(table, granularity="kv"))
    with pytest.raises(InputError, match="same direction"):
        table.compare(replace(table, direction="lower"))
    with pytest.raises(InputError, match="k must lie between 1 and the 6 heads; got 7"):
        table.compare(table, k=7)


def test_truth_found_exactly(table):
    found = table.score_against([HEADS[0], HEADS[3]])
    assert (found.precision, found.recall, found.f1) == (1, 1, 1)
    assert (found.auroc, found.average_precision) == (1, 1)
    assert found.false_positives == found.false_negatives == ()


def test_truth_missed_in_part(table):
    found = table.score_against({HEADS[3], HEADS[4], HEADS[2]})
    assert (found.precision, found.recall) == (1 / 2, 1 / 3)
    assert found.f1 == pytest.approx(2 * 1 / (2 + 3))
    assert found.false_positives == (HEADS[0],)
    assert found.false_negatives == (HEADS[2], HEADS[4])


def test_truth_without_claims_or_positives(table):
    silent = replace(table, threshold=9.0).score_against([HEADS[0]])
    assert math.isnan(silent.precision)
    assert (silent.recall, silent.f1) == (0, 0)
    nothing = table.score_against([])
    assert nothing.precision == 0
    assert all(math.isnan(x) for x in (nothing.recall, nothing.auroc, nothing.average_precision))
    with pytest.raises(HeadIdError, match="it has no L7H7"):
        table.score_against([HeadId(7, 7)])


@settings(deadline=None)
@given(
    arrays(np.float64, 9, elements=st.integers(0, 4).map(float)),
    arrays(np.bool_, 9).filter(lambda true: 0 < true.sum() < 9),
)
def test_ranking_quality_equals_scikit_learn(values, true):
    heads = [HeadId(0, i) for i in range(9)]
    truth = [head for head, is_true in zip(heads, true, strict=True) if is_true]
    found = accuracy(heads, values, true, truth)
    assert found.auroc == pytest.approx(roc_auc_score(true, values))
    assert found.average_precision == pytest.approx(average_precision_score(true, values))
    low = accuracy(heads, values, true, truth, sign=-1.0)
    assert low.auroc == pytest.approx(roc_auc_score(true, -values))


def test_an_undefined_true_head_ranks_last():
    heads = [HeadId(0, i) for i in range(3)]
    values = np.array([NAN, -5.0, -6.0])
    found = accuracy(heads, values, np.zeros(3, dtype=bool), heads[:1])
    assert found.auroc == 0
    assert found.average_precision == pytest.approx(1 / 3)


# shards


@settings(deadline=None, max_examples=40)
@given(arrays(np.float64, (9, 6), elements=st.floats(0, 1) | st.just(NAN)), st.integers(1, 7))
def test_shards_cut_anywhere_give_the_same_table(values, cut):
    each = np.nan_to_num(values) * 2
    null = values[::-1] / 2
    whole = make(values, null, extras={"copying": each, "place": np.arange(6)}, threshold=0.2)
    parts = [
        make(
            values[rows],
            null[rows],
            examples=whole.examples[rows],
            extras={"copying": each[rows], "place": np.arange(6)},
            threshold=0.2,
        )
        for rows in (slice(0, cut), slice(cut, cut + 1), slice(cut + 1, None))
    ]
    for merged in (
        parts[0].merge(parts[1]).merge(parts[2]),
        parts[0].merge(parts[1].merge(parts[2])),
    ):
        assert merged.same_values(whole)
        for name in ("score", "ci_lo", "ci_hi", "n", "null", "p", "q", "copying", "place"):
            np.testing.assert_array_equal(merged.column(name), whole.column(name))


def test_shards_keep_failures_and_differing_provenance():
    def shard(i: int, seed: int) -> HeadScores:
        return make(
            np.ones((1, 6)),
            examples=(f"e{i}",),
            failures=((f"f{i}", "wrong"),),
            provenance={"model": "m", "seed": seed},
        )

    merged = shard(0, 1).merge(shard(1, 2)).merge(shard(2, 1))
    assert merged.failures == (("f0", "wrong"), ("f1", "wrong"), ("f2", "wrong"))
    assert merged.provenance == {"model": "m", "seed": {"shards": [1, 2]}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"examples": ("e0", "z")}, "both have 'e0'"),
        ({"examples": ("y", "z"), "failures": (("e1", "wrong"),)}, "both have 'e1'"),
        ({"threshold": 0.5}, "same threshold; got -inf and 0.5"),
        ({"params": {"k": 2}}, "same params"),
        ({"provenance": {"model": "other"}}, "same model; got None and 'other'"),
        ({"null": None}, "same controls"),
        ({"extras": {"place": np.ones(6)}}, "agree on the column 'place'"),
        ({"extras": {}}, "same extras"),
    ],
)
def test_shards_of_something_else_are_refused(fields, message):
    first = make(np.zeros((2, 6)), extras={"place": np.zeros(6)})
    given = {"examples": ("y", "z"), "extras": {"place": np.zeros(6)}} | fields
    with pytest.raises(InputError, match=message):
        first.merge(make(np.zeros((2, 6)), **given))


# rows


def test_rows_are_plain_and_ranked(table):
    rows = table.rows()
    assert [row["head"] for row in rows] == ["L0H0", "L1H0", "L0H2", "L0H1", "L1H2", "L1H1"]
    assert all(tuple(row) == COLUMNS for row in rows)
    assert {type(value) for row in rows for value in row.values()} <= {str, int, float, type(None)}
    first, last = rows[0], rows[-1]
    assert (first["detector"], first["tower"], first["layer"], first["index"]) == (
        *("copy", "text"),
        *(0, 0),
    )
    assert (first["n"], first["verdict"], first["null"]) == (10, "copy", 0.0)
    assert [last[name] for name in ("score", "ci_lo", "ci_hi", "n", "q", "verdict")] == [
        *(None, None, None),
        *(0, None, "undefined"),
    ]
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows


def test_frame_holds_the_rows_and_the_extras(table):
    frame = replace(table, extras={"place": np.arange(6)}).to_frame()
    assert list(frame.columns) == [*COLUMNS, "place"]
    assert frame["place"].tolist() == [0, 3, 2, 1, 5, 4]
    assert frame["score"].dtype == np.float64
    assert math.isnan(frame["score"].iloc[-1])
    empty = make(np.full((1, 6), NAN)).to_frame()
    assert empty["q"].dtype == np.float64


# files


def test_saved_and_loaded_tables_are_equal(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.random((4, 6), dtype=np.float32)
    values[0, 2] = NAN
    heads = (*HEADS[:5], HeadId(3, 2, "vision"))
    table = HeadScores(
        "copy/mean",
        heads,
        values.astype(np.float32),
        rng.random((4, 6)).astype(np.float32),
        ("a", "b", "ü", "<d>"),
        failures=(("e", "wrong"),),
        threshold=0.1,
        alpha=0.01,
        unit="share",
        range=(0.0, math.inf),
        direction="higher",
        params={"k": 1 / 3, "mode": "published", "spans": ("a", "b"), "none": None},
        provenance={"model": "m", "seed": 3, "x": NAN},
        granularity="kv",
        extras={"place": np.arange(6), "each": np.asfortranarray(rng.random((4, 6)))},
    )
    path = table.save(tmp_path / "new" / "folder")
    assert path.name == "copy_mean.safetensors"
    for source in (path, path.parent):
        loaded = HeadScores.load(source)
        assert loaded.same_values(table)
        assert loaded.per_example.dtype == np.float32
        assert loaded.extras["place"].dtype == np.arange(6).dtype
        for name in ("unit", "range", "granularity", "heads", "failures", "threshold", "alpha"):
            assert getattr(loaded, name) == getattr(table, name)
        assert loaded.params == {
            "k": 1 / 3,
            "mode": "published",
            "spans": ["a", "b"],
            "none": None,
        }
        assert loaded.provenance == {"model": "m", "seed": 3, "x": None}
        assert loaded.rows() == table.rows()
    assert table.to_bytes() == loaded.to_bytes()


def test_a_table_without_limits_survives_the_disk(tmp_path, table):
    bare = steady(*range(6), null=None)
    loaded = HeadScores.load(bare.save(tmp_path))
    assert loaded.null_per_example is None
    assert (loaded.threshold, loaded.range) == (-math.inf, (-math.inf, math.inf))


def test_same_values_sees_every_difference(table):
    assert table.same_values(replace(table, params={"k": 1}))
    moved = np.array(table.per_example)
    moved[0, 0] += 1e-9
    shifted = replace(table, per_example=moved)
    assert not table.same_values(shifted)
    assert table.same_values(shifted, atol=1e-8)
    assert not table.same_values(replace(table, null_per_example=None))
    assert not table.same_values(replace(table, examples=tuple("abcdefghij")))
    assert not table.same_values(replace(table, extras={"x": np.zeros(6)}))
    assert not table.same_values(replace(table, threshold=0.2))


def damaged(path, **changes):
    arrays_, meta = read_table(path)
    write_table(path, arrays_, {**meta, **changes})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-5]), "t.safetensors must be a whole table"),
        (lambda p: p.write_bytes(b""), "t.safetensors must be a whole table"),
        (lambda p: p.write_bytes(b"x" * 500), "t.safetensors must be a whole table"),
        (lambda p: p.write_bytes(save_arrays({"a": np.zeros(2)})), "must be a whole table"),
        (lambda p: p.unlink(), "cannot read .*t.safetensors: No such file"),
        (lambda p: damaged(p, version=99), "is version 99 .* this program reads version 1"),
        (lambda p: damaged(p, schema="other"), "is not a table of head scores"),
        (lambda p: damaged(p, heads=[["text", 0]]), "damaged table of scores"),
        (lambda p: damaged(p, examples=None), "damaged table of scores"),
        (lambda p: damaged(p, direction="up"), "damaged table of scores"),
    ],
)
def test_damaged_tables_are_named(tmp_path, table, change, message):
    path = table.save(tmp_path).rename(tmp_path / "t.safetensors")
    change(path)
    with pytest.raises(RunError, match=message):
        HeadScores.load(path)


def test_a_folder_must_hold_one_table(tmp_path, table):
    with pytest.raises(RunError, match="must hold one table of scores; it holds 0"):
        HeadScores.load(tmp_path)
    table.save(tmp_path)
    replace(table, detector="other").save(tmp_path)
    with pytest.raises(RunError, match="it holds 2"):
        HeadScores.load(tmp_path)


def test_arrays_in_any_memory_order_come_back_as_they_were(tmp_path):
    given = {"t": np.arange(6.0).reshape(2, 3).T, "s": np.arange(8)[::2], "o": np.array(2.5)}
    write_table(tmp_path / "a", given, {})
    loaded, _ = read_table(tmp_path / "a")
    for name, array in given.items():
        np.testing.assert_array_equal(loaded[name], array)
        assert loaded[name].shape == array.shape


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_json_keeps_every_bit_of_a_float(value):
    assert json.loads(json.dumps(jsonable({"x": np.float64(value)})))["x"] == value


def test_json_has_no_nan():
    content = jsonable({"a": NAN, "b": [np.float32("nan"), -math.inf], 3: np.array([1, 2])})
    assert content == {"a": None, "b": [None, "-inf"], "3": [1, 2]}


# display


def test_text_is_five_lines(table):
    lines = repr(table).split("\n")
    assert len(lines) == 5
    assert lines[3] == "  claimed: 2 with q <= 0.05 and score >= 0.1"
    assert "L0H0 0.9 [" in lines[4]
    assert len(repr(make(np.full((0, 6), NAN), examples=())).split("\n")) == 5


def test_html_is_small_static_and_escaped():
    heads = tuple(HeadId(layer, head) for layer in range(80) for head in range(64))
    rng = np.random.default_rng(0)
    table = HeadScores(
        "<script>alert(1)</script>" + "d" * 10_000,
        heads,
        1 + rng.random((30, len(heads))),
        np.zeros((30, len(heads))),
        tuple(map(str, range(30))),
        unit="<b>" + "u" * 10_000,
        provenance={"model": "<img src=x>" + "m" * 10_000},
        failures=(("f", "</table>" + "x" * 10_000),),
    )
    html = table._repr_html_()
    assert len(html.encode()) < 20_000
    assert html.count("&lt;script") == 21
    assert "<script" not in html
    assert "<img" not in html
    assert "http" not in html
    assert html.count("<tr") == 21
    assert "5100 more heads" in html


def test_plot_shows_every_head_and_marks_the_claimed(table):
    figure = table.plot()
    heat, marks = figure.data
    np.testing.assert_array_equal(heat.z, table.grid().astype(np.float32))
    assert list(zip(marks.y, marks.x, strict=True)) == [(0, 0), (1, 0)]
    assert heat.text[0][0].startswith("L0H0: score 0.9, ci_lo 0.8")
    assert "verdict undefined" in heat.text[1][1]
    assert heat.zmin == -heat.zmax < 0
    shares = replace(table, range=(0.0, 1.0)).plot().data[0]
    assert (shares.zmin, shares.zmax) == (0, np.nanmax(table.values))
    weak = replace(table, range=(0.0, 100.0)).plot().data[0]
    assert (weak.zmin, weak.zmax) == (0, 10)


def test_plot_draws_the_tower_asked_for():
    heads = (HeadId(0, 0), HeadId(1, 1, "vision"))
    table = make([[1.0, 2.0]], heads=heads)
    assert np.array(table.plot().data[0].z).shape == (1, 1)
    vision = table.plot("vision").data[0]
    assert np.array(vision.z).shape == (2, 2)
    assert vision.text[0][0] == "no such head"


def test_scores_and_runs_are_read_without_torch():
    code = (
        "import sys, interp.scores, interp.run, interp.stats; "
        "print([m for m in ('torch', 'transformers', 'pandas', 'plotly', 'scipy') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
