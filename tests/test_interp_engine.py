"""Every reading against whole matrices of an eager copy, over families, paddings and kernels."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import (
    Whole,
    batch_of,
    fresh,
    fused,
    handle,
    naive,
    opaque,
    prompt,
    registered,
    related,
    whole,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from interp import readings as rd
from interp.engine import Answer, read
from interp.errors import InputError, SiteError, SpanError
from interp.kernels import gather, sweep
from interp.model import Model
from interp.prompts import Batch, Prompt
from interp.seam import kernel
from interp.seam.calls import AttnCall

READINGS: dict[str, rd.Reading] = {
    "self": rd.PairMass(rd.Offset(0)),
    "previous": rd.PairMass(rd.Offset(1)),
    "third_late": rd.PairMass(rd.Offset(3), query="late"),
    "duplicate": rd.PairMass(rd.Same(0)),
    "induction": rd.PairMass(rd.Same(1), query="late"),
    "induction_entry": rd.PairMass(rd.Same(1), per="entry"),
    "never": rd.PairMass(rd.Offset(500)),
    "sink": rd.SpanMass("bos"),
    "needle": rd.SpanMass("needle", query="late"),
    "wide": rd.SpanMass("wide"),
    "wide_late": rd.SpanMass("wide", query="late"),
    "distance": rd.Distance(),
    "distance_late": rd.Distance("late"),
    "entropy": rd.Entropy(),
    "entropy_late": rd.Entropy("late"),
    "keymass": rd.KeyMass(),
    "keymass_late": rd.KeyMass("late"),
    "top": rd.TopKey("late"),
    "top_all": rd.TopKey("all"),
    "rows": rd.Rows("late"),
    "rows_all": rd.Rows("all"),
    "znorm": rd.ZNorm(),
    "znorm_late": rd.ZNorm("late"),
    "z": rd.ZValue("late"),
    "values": rd.ValueNorm(),
    "values_wide": rd.ValueNorm("wide"),
}
PAIRS = {n for n, r in READINGS.items() if isinstance(r, rd.PairMass)}
SCALARS = {
    n: r
    for n, r in READINGS.items()
    if not isinstance(r, rd.KeyMass | rd.TopKey | rd.Rows | rd.ZValue)
}
FAMILIES = {
    "gpt2": ("sdpa", "eager", "opaque"),
    "llama": ("sdpa", "eager", "opaque", "fused"),
    "llama-head8": ("sdpa",),
    "mistral": ("sdpa", "eager", "opaque", "fused"),
    "gemma2": ("eager", "opaque"),
    "gpt-oss": ("eager", "opaque"),
    "bloom": ("",),
    "deepseek-v2": ("sdpa", "eager"),
    "deepseek-v3": ("sdpa", "eager"),
    "bert": ("sdpa", "eager", "fused"),
}
BATCHES = {
    "one": ((20,), "right"),
    "three": ((17, 17, 17), "right"),
    "right": ((20, 13, 17), "right"),
    "left": ((20, 13, 17), "left"),
}


@pytest.fixture(autouse=True, scope="module")
def kernels() -> Iterator[None]:
    """Two further implementations: eager without weights, and one like flash attention."""
    with registered("opaque", opaque, "eager"), registered("fused", fused, "flash_attention_2"):
        yield


def compare(
    answers: dict[str, Answer],
    full: object,
    tower: str,
    queries: Batch,
    keys: Batch,
    *,
    causal: bool,
    tolerance: float = 1e-5,
) -> None:
    """Every answer equals its loop to the tolerance (of z and lengths: relative)."""
    for name, answer in answers.items():
        reading = READINGS[name]
        want = naive(reading, full, tower, queries, keys, causal=causal)
        got = answer.values.double().numpy()
        assert got.shape == want.shape, name
        assert (np.isnan(got) == np.isnan(want)).all(), name
        assert answer.exact and len(answer.how) == len(full.patterns[tower])
        if isinstance(reading, rd.TopKey):
            continue_at = ~np.isnan(want)
            rows = naive(rd.Rows(reading.query), full, tower, queries, keys, causal=causal)
            mass = np.take_along_axis(rows, np.nan_to_num(got)[..., None].astype(int), -1)[..., 0]
            best = np.nan_to_num(rows).max(-1)
            assert (best - mass)[continue_at].max() <= tolerance, name
            clear = np.sort(np.nan_to_num(rows), -1)
            clear = continue_at & (clear[..., -1] - clear[..., -2] > 1e-4)
            assert clear.any() and (got == want)[clear].all(), name
            continue
        size = max(1.0, np.nanmax(np.abs(want))) if np.isfinite(want).any() else 1.0
        gap = np.nanmax(np.abs(got - want), initial=0)
        assert gap <= tolerance * size, (name, answer.how, gap)


@pytest.mark.parametrize("shape", BATCHES)
@pytest.mark.parametrize(
    ("family", "attn"), [(f, a) for f, kinds in FAMILIES.items() for a in kinds]
)
def test_readings_equal_loops_over_whole_matrices(family: str, attn: str, shape: str) -> None:
    model = handle(family, attn)
    lengths, side = BATCHES[shape]
    batch = batch_of(lengths, side)
    wanted = {
        n: r for n, r in READINGS.items() if not (family == "bloom" and isinstance(r, rd.ValueNorm))
    }
    answers = read(model, batch, wanted)
    full = whole(family, batch.inputs())
    compare(answers, full, "text", batch, batch, causal=family != "bert")


def test_the_matrices_are_worth_comparing() -> None:
    """Patterns differ between heads and are neither uniform nor one-hot."""
    full = whole("llama", batch_of((20,)).inputs())
    last = np.stack(full.patterns["text"])[:, 0, :, -1]
    assert 0.1 < last.max() < 0.999
    assert last.max(-1).std() > 0.01
    assert np.abs(last[0, 0] - last[1, 1]).max() > 0.05


@pytest.mark.parametrize("attn", ["sdpa", "eager", "opaque"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("tower", ["text", "encoder", "cross"])
def test_t5_reads_each_of_its_towers(tower: str, side: str, attn: str) -> None:
    model = handle("t5", attn)
    batch = batch_of((20, 13, 17), side, decoder=(11, 9, 10))
    assert batch.decoder is not None
    queries = batch if tower == "encoder" else batch.decoder
    keys = batch.decoder if tower == "text" else batch
    wanted = {n: r for n, r in READINGS.items() if tower != "cross" or n not in PAIRS}
    answers = read(model, batch, wanted, tower=tower)
    full = whole("t5", batch.inputs())
    compare(answers, full, tower, queries, keys, causal=tower == "text")


def test_each_reading_is_served_by_its_cheapest_kernel() -> None:
    batch = batch_of((20, 13))
    wanted = {n: READINGS[n] for n in ("previous", "sink", "wide", "distance", "values")}

    def kinds(family: str, attn: str, **more: rd.Reading) -> dict[str, set[str]]:
        answers = read(handle(family, attn), batch, {**wanted, **more})
        return {n: set(a.how) for n, a in answers.items()}

    fast = {"previous": {"gather"}, "sink": {"gather"}, "values": {"z"}}
    appended = {"wide": {"columns"}, "distance": {"columns"}}
    assert kinds("llama", "sdpa") == {**fast, **appended}
    # Columns that share their rows with a sweep are swept along.
    swept = {"wide": {"sweep"}, "distance": {"sweep"}, "entropy": {"sweep"}}
    assert kinds("llama", "sdpa", entropy=rd.Entropy()) == {**fast, **swept}
    estimate = kinds("llama", "sdpa", estimate=rd.Entropy(sample=4))
    assert estimate == {**fast, **appended, "estimate": {"sampled"}}
    everything = kinds("llama", "eager")
    assert everything.pop("values") == {"z"} and set.union(*everything.values()) == {"pattern"}


def test_shapes_where_columns_would_change_a_bit_are_swept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which shapes those are is up to the machine, so the finding is put in the kernel's mouth."""
    batch = batch_of((20, 13))
    wanted = {"wide": READINGS["wide"], "distance": READINGS["distance"]}
    full = whole("llama", batch.inputs())
    for name in ("appending_keeps_bits", "in_whole_vectors"):
        with monkeypatch.context() as patch:
            patch.setattr(kernel, name, lambda *_: False)
            answers = read(handle("llama", "sdpa"), batch, wanted)
        assert {k for a in answers.values() for k in a.how} == {"sweep"}
        compare(answers, full, "text", batch, batch, causal=True)


@pytest.mark.parametrize("family", ["llama", "llama-head8", "mistral", "gpt2", "bert"])
def test_long_prompts_take_several_blocks(family: str) -> None:
    """More rows than one block of a sweep, odd widths, and rows that are not contiguous."""
    batch = batch_of((150, 131), "left")
    wanted = {n: r for n, r in READINGS.items() if n != "rows_all"}
    full = whole(family, batch.inputs())
    answers = read(handle(family, "sdpa"), batch, wanted)
    compare(answers, full, "text", batch, batch, causal=family != "bert", tolerance=2e-5)


def test_few_heads_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of((40, 33))
    full = whole("llama", batch.inputs())
    for elements in (1, 64 * 33, 2 * 64 * 40):
        monkeypatch.setattr(sweep, "_ELEMENTS", elements)
        monkeypatch.setattr(gather, "_CHUNK", 64 * 7)
        answers = read(handle("llama", "sdpa"), batch, READINGS)
        compare(answers, full, "text", batch, batch, causal=True)


@pytest.mark.parametrize("lengths", [(20, 13), (20, 20)])
@pytest.mark.parametrize("back", [-2, -1, 0, 2])
@pytest.mark.parametrize(
    ("family", "attn"), [("llama", "sdpa"), ("llama", "opaque"), ("bert", "sdpa")]
)
def test_relations_may_point_forward(
    family: str, attn: str, back: int, lengths: tuple[int, ...]
) -> None:
    """A later key has no mass in a causal model, masked or not, and some in another."""
    batch = batch_of(lengths, "left")
    reading = rd.PairMass(rd.Offset(back))
    answer = read(handle(family, attn), batch, {"x": reading})["x"].values.numpy()
    full = whole(family, batch.inputs())
    want = naive(reading, full, "text", batch, batch, causal=family != "bert")
    np.testing.assert_allclose(answer, want, atol=1e-5)
    assert (answer.max() == 0) == (family == "llama" and back < 0)


@pytest.mark.parametrize("shift", [-2, -1, 0, 1, 2])
def test_related_keys_stay_inside_the_prompt(shift: int) -> None:
    for seed in range(5):
        one = prompt(12, seed)
        want = related(rd.Same(shift), one.tokens)
        assert rd.Same(shift).pairs(one).tolist() == [list(x) for x in want]


def test_a_control_is_read_where_its_prompt_is() -> None:
    one = prompt(16, 1)
    control = one.controlled_by(tuple(range(20, 36)))
    batch = Batch.of([control])
    reading = rd.PairMass(rd.Same(1))
    got = read(handle("llama", "sdpa"), batch, {"x": reading})["x"].values.numpy()
    want = naive(reading, whole("llama", batch.inputs()), "text", batch, batch, causal=True)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, want, atol=1e-5)


# Other dtypes --------------------------------------------------------------------------------


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_bfloat16_against_the_same_weights_in_float32(attn: str) -> None:
    """16-bit models round their own states: 0.06 of mass and of a token's length, no better."""
    hf = fresh("llama", attn).bfloat16()
    batch = batch_of((20, 13))
    full = whole("llama", batch.inputs(), fresh("llama", "eager").bfloat16().float())
    wanted = {n: r for n, r in READINGS.items() if not isinstance(r, rd.TopKey | rd.Distance)}
    answers = read(Model(hf, name="half"), batch, wanted)
    compare(answers, full, "text", batch, batch, causal=True, tolerance=0.06)
    assert "columns" not in {k for a in answers.values() for k in a.how}


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 1e-4), (torch.float32, 2e-6), (torch.float64, 1e-13)]
)
def test_nothing_is_lost_beyond_the_models_own_rounding(
    dtype: torch.dtype, tolerance: float
) -> None:
    """Against float64 arithmetic on the very q and k that the kernel received."""
    model = Model(fresh("llama", "sdpa").to(dtype), name="own")
    batch = batch_of((20, 20))
    calls: list[AttnCall] = []
    with model.observe(calls.append):
        model.forward(batch.inputs())
    patterns = []
    for call in calls:
        s = call.q.double() @ call.k.double().repeat_interleave(2, 1).mT * call.scale
        later = torch.ones(20, 20, dtype=torch.bool).triu(1)
        patterns.append(torch.softmax(s.masked_fill(later, -1e30), -1).numpy())
    z = [c.z.double().numpy() for c in calls]
    v = [c.v.double().numpy() for c in calls]
    full = Whole({"text": patterns}, {"text": v}, {"text": z})
    for chosen in (READINGS, {"wide": READINGS["wide"], "distance": READINGS["distance"]}):
        wanted = {n: r for n, r in chosen.items() if not isinstance(r, rd.TopKey)}
        answers = read(model, batch, wanted)
        compare(answers, full, "text", batch, batch, causal=True, tolerance=tolerance)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert {a.values.dtype for a in answers.values()} == {wide}


# Properties ----------------------------------------------------------------------------------


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    n = draw(st.integers(4, 90))
    tokens = draw(st.lists(st.integers(2, 12), min_size=n, max_size=n))
    spans = {}
    for name in ("needle", "wide", "late", "bos"):
        starts = draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=3))
        spans[name] = tuple((s, draw(st.integers(s + 1, n))) for s in starts)
    return Prompt(tuple(tokens), spans)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    made=st.lists(prompts(), min_size=1, max_size=3),
    side=st.sampled_from(["left", "right"]),
    kind=st.sampled_from([("llama", "sdpa"), ("llama", "opaque"), ("gpt-oss", "opaque")]),
)
def test_any_spans_and_lengths(made: list[Prompt], side: str, kind: tuple[str, str]) -> None:
    batch = Batch.of(made, side=side)
    full = whole(kind[0], batch.inputs())
    wanted = {n: r for n, r in READINGS.items() if n not in ("rows", "rows_all", "top_all")}
    answers = read(handle(*kind), batch, {**wanted, "rows": rd.Rows("late")})
    compare(answers, full, "text", batch, batch, causal=True, tolerance=2e-5)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_mass_over_all_keys_is_one(family: str) -> None:
    batch = batch_of((30, 22), decoder=(12, 12) if family == "t5" else ())
    for tower in handle(family, "sdpa").towers:
        answer = read(handle(family, "sdpa"), batch, {"x": rd.SpanMass("all")}, tower=tower)["x"]
        np.testing.assert_allclose(answer.values.numpy(), 1, atol=1e-5)


def test_learned_sinks_take_their_share() -> None:
    answer = read(handle("gpt-oss", "opaque"), batch_of((30,)), {"x": rd.SpanMass("all")})["x"]
    assert (answer.values < 0.99).all() and (answer.values > 0).all()


def test_how_prompts_are_batched_changes_nothing() -> None:
    made = [prompt(n, n) for n in (20, 13, 17, 9, 20, 11)]
    together = read(handle("mistral", "sdpa"), Batch.of(made, side="left"), SCALARS)
    for i, one in enumerate(made):
        alone = read(handle("mistral", "sdpa"), Batch.of([one]), SCALARS)
        for name, answer in alone.items():
            np.testing.assert_allclose(
                answer.values[0].numpy(), together[name].values[i].numpy(), atol=1e-5 * 20,
                err_msg=name,
            )  # fmt: skip


# Estimates -----------------------------------------------------------------------------------

LENGTHS = (201, 230, 260, 187)


def _sampled(n: int | None) -> dict[str, rd.Reading]:
    return {
        "mass": rd.SpanMass("wide", sample=n),
        "distance": rd.Distance(sample=n),
        "entropy": rd.Entropy(sample=n),
        "keymass": rd.KeyMass(sample=n),
    }


def test_estimates_lie_within_their_stated_error() -> None:
    """|estimate − truth| / SE is about 1 on the whole (rms in 0.6..1.6) and nowhere above 5."""
    model = handle("llama", "sdpa")
    batch = batch_of(LENGTHS, "left")
    truth = read(model, batch, _sampled(None))
    for n in (32, 64):
        guess = read(model, batch, _sampled(n))
        for name in ("mass", "distance", "entropy"):
            se = guess[name].se
            assert se is not None and not guess[name].exact and (se > 0).all()
            assert set(guess[name].how) == {"sampled"}
            pull = ((guess[name].values - truth[name].values) / se).abs()
            assert pull.max() < 5, name
            assert 0.6 < pull.square().mean().sqrt() < 1.6, name


def test_estimated_key_mass_errs_as_much_as_it_says_on_the_whole() -> None:
    """One key's mass comes from few rows, so its own error may be far off; their mean is right."""
    model = handle("llama", "sdpa")
    gaps, errors = [], []
    for n in range(150, 250, 10):
        batch = batch_of((n,))
        truth = read(model, batch, {"x": rd.KeyMass()})["x"].values[0, ..., :100]
        guess = read(model, batch, {"x": rd.KeyMass(sample=32)})["x"]
        gaps.append(guess.values[0, ..., :100] - truth)
        errors.append(guess.se[0, ..., :100])
    gap, se = torch.stack(gaps), torch.stack(errors)
    for at in (0, 50):
        part = slice(at, at + 50)
        ratio = gap[..., part].square().mean().sqrt() / se[..., part].square().mean().sqrt()
        assert 0.8 < ratio < 1.25
    assert gap.mean(0).abs().mean() < 0.5 * gap.abs().mean()


def test_errors_shrink_with_the_sample_and_vanish_with_all_rows() -> None:
    model = handle("llama", "sdpa")
    batch = batch_of(LENGTHS)
    truth = read(model, batch, _sampled(None))
    sizes = [16, 64, 180, 260]
    answers = [read(model, batch, _sampled(n)) for n in sizes]
    for name in ("mass", "distance", "entropy"):
        se = [float(a[name].se.mean()) for a in answers]
        assert se[0] > 1.5 * se[1] > 1.5 * 1.5 * se[2] and se[3] == 0, name
    for name, answer in answers[-1].items():
        np.testing.assert_allclose(
            answer.values.numpy(), truth[name].values.numpy(), atol=2e-5, err_msg=name
        )


def test_the_same_rows_are_drawn_each_time_and_in_any_batch() -> None:
    model = handle("llama", "sdpa")
    made = [prompt(n, n) for n in (80, 71)]
    first, again = (read(model, Batch.of(made), _sampled(16)) for _ in range(2))
    for name, answer in first.items():
        assert torch.equal(answer.values, again[name].values) or name == "keymass"
        assert torch.equal(answer.values.isnan(), again[name].values.isnan())
    alone = read(model, Batch.of(made[1:]), _sampled(16))
    for name in ("mass", "distance", "entropy"):
        np.testing.assert_allclose(
            alone[name].values[0].numpy(), first[name].values[1].numpy(), atol=1e-4
        )


@pytest.mark.parametrize("kind", [rd.Distance, rd.Entropy, rd.KeyMass])
def test_a_sample_too_small_for_an_error_is_refused(kind: type) -> None:
    with pytest.raises(InputError, match="at least 4 rows"):
        kind(sample=3)


# Memory --------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Notes the largest storage that any operator makes, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.who = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in tree_flatten(out)[0]:
            if isinstance(x, torch.Tensor):
                held = x.untyped_storage().nbytes() // x.element_size()
                if held > self.elements:
                    self.elements, self.who = held, str(func)
        return out


def _long(n: int) -> Batch:
    gen = torch.Generator().manual_seed(n)
    tokens = torch.randint(2, 96, (n,), generator=gen).tolist()
    spans = {"bos": ((0, 1),), "needle": ((30, 33),), "wide": ((40, 300),), "late": ((n - 70, n),)}
    return Batch.of([Prompt(tuple(tokens), spans)])


def _largest(family: str, attn: str, n: int, wanted: dict[str, rd.Reading]) -> tuple[int, str]:
    model = handle(family, attn)
    assert model.towers
    with Largest() as seen:
        read(model, _long(n), wanted)
    return seen.elements, seen.who


@pytest.mark.parametrize("family", ["gpt2", "llama", "llama-head8"])
def test_no_matrix_is_made_unless_whole_rows_are_asked_for(family: str) -> None:
    wanted = {n: r for n, r in READINGS.items() if not isinstance(r, rd.Rows)}
    wanted["estimate"] = rd.Entropy(sample=64)
    n = 1088
    short, who = _largest(family, "sdpa", n, wanted)
    assert short < n * n, who
    # How many pairs share a token is up to the text: in random text a T²-th of them.
    wanted = {n: r for n, r in wanted.items() if "Same" not in str(r)}
    short, who = _largest(family, "sdpa", n, wanted)
    long, who = _largest(family, "sdpa", 2 * n, wanted)
    assert long <= 2.5 * short, who


def test_the_memory_test_sees_a_matrix() -> None:
    entropy: dict[str, rd.Reading] = {"x": rd.Entropy()}
    assert _largest("llama", "eager", 1088, entropy)[0] >= 1088**2
    assert _largest("llama", "sdpa", 1088, {"x": rd.Rows("all")})[0] >= 1088**2


# Vision, and what is refused ------------------------------------------------------------------


def _pixels(lengths: tuple[int, ...]) -> Batch:
    gen = torch.Generator().manual_seed(1)
    made = batch_of(lengths)
    pixels = torch.randn(len(lengths), 3, 16, 16, generator=gen)
    return Batch(
        made.prompts, made.input_ids, made.attention_mask, made.offsets,
        extra={"pixel_values": pixels},
    )  # fmt: skip


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("lengths", [(9, 12), (17, 12)])
def test_a_vision_tower_is_read_over_its_patches(attn: str, lengths: tuple[int, ...]) -> None:
    """Also where there are as many patches as the prompt has tokens (17)."""
    batch = _pixels(lengths)
    patches = Batch.of([Prompt((1,) * 17), Prompt((1,) * 17)])
    wanted = {n: READINGS[n] for n in ("distance", "entropy", "keymass", "rows_all", "znorm")}
    wanted |= {n: READINGS[n] for n in ("top_all", "values")}
    answers = read(handle("vit", attn), batch, wanted)
    full = whole("vit", {"pixel_values": batch.extra["pixel_values"]})
    compare(answers, full, "vision", patches, patches, causal=False)


@pytest.mark.parametrize("lengths", [(9, 12), (17, 12)])
@pytest.mark.parametrize("reading", [rd.SpanMass("needle"), rd.PairMass(rd.Offset(1))])
def test_patches_have_no_spans_of_tokens(reading: rd.Reading, lengths: tuple[int, ...]) -> None:
    with pytest.raises(SiteError):
        read(handle("vit", "sdpa"), _pixels(lengths), {"x": reading})


def test_values_that_are_not_reached_are_refused() -> None:
    with pytest.raises(SiteError, match="only its pattern"):
        read(handle("bloom"), batch_of((12,)), {"x": rd.ValueNorm()})


def test_a_missing_span_names_those_there_are() -> None:
    with pytest.raises(SpanError, match="no span 'nowhere'; it has: bos, needle"):
        read(handle("llama", "sdpa"), batch_of((12,)), {"x": rd.SpanMass("nowhere")})


def test_a_tower_that_is_not_there_is_refused() -> None:
    with pytest.raises(SiteError, match="has no tower 'vision'; it has: text"):
        read(handle("llama", "sdpa"), batch_of((12,)), {"x": rd.Entropy()}, tower="vision")


def test_relations_between_two_sequences_are_refused() -> None:
    batch = batch_of((12, 12), decoder=(12, 12))
    with pytest.raises(SiteError, match="both the prompt's tokens"):
        read(handle("t5", "sdpa"), batch, {"x": rd.PairMass(rd.Offset(1))}, tower="cross")


def test_a_layer_that_is_skipped_or_run_twice_is_refused() -> None:
    hf = fresh("llama", "sdpa")
    model = Model(hf, name="odd")
    batch = batch_of((12, 12))
    assert len(model.towers["text"].layers) == 2
    layers = hf.model.layers
    first = layers[0]
    hf.model.layers = torch.nn.ModuleList([first, first])
    with pytest.raises(SiteError, match="called twice"):
        read(model, batch, {"x": rd.Entropy()})
    hf.model.layers = layers
    hf.config.num_hidden_layers = 1
    with pytest.raises(SiteError, match="did not reach 1 of 2"):
        read(model, batch, {"x": rd.Entropy()})
