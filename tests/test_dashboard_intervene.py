"""Interventions: what the form asks for, what its commands keep, what the page draws of it."""

import itertools
import json
import shlex

import browser
import numpy as np
import pytest
import torch
from dashboard_kit import leave, served_to, show, violations, visit
from hypothesis import given, settings
from hypothesis import strategies as st

from app.cli import main
from app.dashboard.intervene import (
    OPERATIONS,
    Form,
    detector_of,
    form_of,
    heads_of,
    line_of,
    source_of,
    task_of,
)
from app.dashboard.intervene_parts import pieces
from app.dashboard.intervene_result import measured, shown
from app.dashboard.jobs_line import _parsed, check_line
from app.dashboard.library import Library
from app.exits import UsageError
from app.figures.intervene import Line, changes, dose, forest
from app.together import sets_of
from interp.errors import RunError
from interp.loading import load
from interp.recipe import Edit, Recipe, Where
from interp.tasks import make_task

chromium = pytest.fixture(scope="module")(browser.chromium)
tab = pytest.fixture(scope="module")(browser.tab)
page = pytest.fixture(browser.kept)

RETRIEVAL = "zoo:planted-retrieval"
NEEDLE = ("--task", "needle", "--param", "needle:lengths=48", "-q")
ON = ("--model", RETRIEVAL, *NEEDLE)
PAIR = ("--heads", "L0H0,L1H0", "--joint", "--each", "--n", "3", "--controls", "2")
STEER = ("--heads", "L1H0", "--windows", "2", "--controls", "2", "--n", "2")
RUNS = {
    "sets": ("ablate", *ON, *PAIR),
    "one": ("ablate", *ON, "--heads", "L1H0", "--joint", "--each", "--n", "3"),
    "pairs": ("ablate", "-m", "zoo:planted-ioi", "-t", "ioi", "-q", "--n", "3", "--reference",
              "mean", "--heads", "L2H0,L2H1", "--joint", "--each", "--controls", "2"),
    "ablate": ("ablate", *ON, "--n", "3", "--heads", "L1"),
    "needle": ("ablate", "-m", "zoo:needle", *NEEDLE, "--heads", "L1H0,L1H2", "--joint", "--each",
               "--n", "4", "--controls", "3"),
    "verdict": ("verdict", "retrieval", "-m", "zoo:needle", *NEEDLE, "--n", "9",
                "--controls", "2", "--heads", "L1H0,L1H1"),
    "steer": ("steer", "run", "--op", "zero", *ON, *STEER, "--tokens", "4"),
    "sweep": ("steer", "sweep", "--op", "scale", "--strengths", "0,1,2", *ON, *STEER),
    "rank": ("rank", "retrieval", "--model", RETRIEVAL, *NEEDLE, "--n", "4"),
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A run of each kind."""
    place = tmp_path_factory.mktemp("runs")
    for name, line in RUNS.items():
        assert main([*line, "--out", str(place / name)]) == 0, name
    return place


@pytest.fixture(scope="module")
def library(root):
    return Library(root)


def rows_of(library, name):
    return library.open(name).facts["rows"]


def log_prob(model, prompts, heads):
    """Mean log-probability of the answers with heads taken away, one prompt at a time."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([[*prompt.tokens, *prompt.answer]])
        with torch.no_grad(), Recipe((Edit("zero", Where(heads=heads)),)).on(model):
            logits = model.hf(ids, use_cache=False).logits
        said = logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        found.append(said.gather(1, torch.tensor(prompt.answer)[:, None]).mean().item())
    return float(np.mean(found))


# ---- what the commands keep


def test_each_head_alone_and_all_but_each_beside_the_heads_that_stand_for_it(library):
    facts, rows = library.open("sets").facts, rows_of(library, "sets")
    model = load(RETRIEVAL)
    prompts = make_task("needle", {"lengths": "48"}).prompts(model, 3, seed=0)
    bare = np.mean([
        model.hf(torch.tensor([[*p.tokens, *p.answer]])).logits[0, len(p) - 1 : -1].double()
        .log_softmax(-1).gather(1, torch.tensor(p.answer)[:, None]).mean().item()
        for p in prompts
    ])  # fmt: skip
    assert facts["base"] == pytest.approx(bare, abs=1e-6) and facts["base_accuracy"] == 1.0
    for row in rows:
        heads = row["heads"].split()
        if heads:
            want = log_prob(model, prompts, heads) - bare
            assert row["effect"] == pytest.approx(want, abs=1e-5), row["set"]
    kinds = [(r["kind"], r.get("of", "")) for r in rows]
    whole = [("chosen", ""), ("random mean", ""), ("random", ""), ("random", "")]
    alone = lambda h: [(f"alone{k}", h) for k in ("", " random mean", " random", " random")]  # noqa: E731
    rest = [("without", "L0H0"), ("without", "L1H0")]
    assert kinds == [*whole, *alone("L0H0"), *alone("L1H0"), *rest]
    by = {r["set"]: r for r in rows}
    assert by["without L0H0"]["heads"] == "L1H0" and by["without L1H0"]["heads"] == "L0H0"
    for i, head in itertools.product((1, 2), ("L0H0", "L1H0")):
        one = by[f"{head}, random {i}"]["heads"]
        # The head that stands for one is the one of its layer in the draw of all.
        assert one[:2] == head[:2] and one in by[f"random {i}"]["heads"].split() and one != head
    table = library.open("sets").tables["ablate.zero"]
    for head, value, null in zip(table.heads, table.values, table.null, strict=True):
        assert value == pytest.approx(by[str(head)]["effect"])
        assert null == pytest.approx(by[f"{head}, random, mean"]["effect"])


def test_one_head_alone_is_already_all_of_them(library):
    assert {r["kind"] for r in rows_of(library, "one")} == {"chosen", "random mean", "random"}


def test_on_pairs_sets_are_those_of_patching(library):
    from interp.headid import HeadId
    from patching.prune import joint_effects

    model = load("zoo:planted-ioi")
    rows = [r for r in rows_of(library, "pairs") if r["heads"]]
    sets = [[HeadId.parse(h) for h in r["heads"].split()] for r in rows]
    found = joint_effects(model, make_task("ioi").pairs(model, 3, seed=0), sets, reference="mean")
    assert [r["effect"] for r in rows] == pytest.approx(list(found.values), abs=1e-6)
    assert {r["accuracy"] for r in rows} == {None}


def test_a_dry_run_counts_no_fewer_sets_than_are_run(root, capsys):
    line = [x for x in RUNS["sets"] if x != "-q"]
    capsys.readouterr()
    assert main([*line, "--dry-run", "--format", "jsonl", "-q"]) == 0
    told = {
        r["quantity"]: r["value"] for r in map(json.loads, capsys.readouterr().out.split("\n")[:-1])
    }
    run = {frozenset(r["heads"].split()) for r in rows_of(Library(root), "sets") if r["heads"]}
    # Two heads: all but one is the other, so nothing is run for it.
    assert told["sets of heads"] == sets_of(2, 2, True) == 1 + 2 + 2 + 4 >= len(run)
    assert sets_of(3, 2, True) == 1 + 2 + 3 + 3 + 6 and sets_of(1, 2, True) == 3
    assert sets_of(3, 2, False) == 3


def test_each_without_joint_is_refused(capsys):
    assert main(["ablate", *ON, "--heads", "L1H0", "--each"]) == 2
    assert "--each needs --joint" in capsys.readouterr().err


def test_changes_of_a_recipe_have_intervals_and_every_draw(library):
    from app.sideeffects import measure

    model = load(RETRIEVAL)
    prompts = make_task("needle", {"lengths": "48"}).prompts(model, 2, seed=0)
    for row in measured(library.open("sweep").facts, "rows"):
        assert row["ci_lo"] <= row["change"] + 1e-9 and row["change"] <= row["ci_hi"] + 1e-9
        assert np.mean(row["control_changes"]) == pytest.approx(row["control_change"], abs=1e-9)
        if row["measure"] != "cross-entropy of answers":
            continue
        made = Recipe((Edit("scale", Where(heads=("L1H0",)), strength=row["strength"]),))
        seen = measure(model, prompts, (made, *made.control(model, 2, seed=0))).cross_entropy
        assert row["control_changes"] == pytest.approx(list(seen[2:].mean(1) - seen[0].mean()))
        spread = seen[1] - seen[0]
        assert spread.min() - 1e-9 <= row["ci_lo"] and row["ci_hi"] <= spread.max() + 1e-9


def test_a_verdict_keeps_each_draw_of_its_controls(library):
    facts = library.open("verdict").facts
    rows = {r["head"]: r for r in facts["rows"]}
    assert set(facts["draws"]) >= set(rows) and len(rows) >= 2
    for name, row in rows.items():
        effects = [d["effect"] for d in facts["draws"][name]]
        assert len(effects) == row["controls"]
        assert np.mean(effects) == pytest.approx(row["control"]) and row["control"] < -1e-6
        assert name not in {h for d in facts["draws"][name] for h in d["heads"].split()}


# ---- the form


def form(**values):
    source = ("--model", RETRIEVAL)
    texts = tuple(values.pop("texts", ()))
    return Form(("L0H0", "L1H1"), source, values.pop("task", "needle"), texts, values)


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_the_form_asks_for_is_a_command_that_can_run_as_a_job(name, tmp_path):
    op = OPERATIONS[name]
    task = "ioi" if op.pairs else "needle"
    given_ = form(task=task, n="5", seed="-3", draws="2", over="span:needle", at="last", alpha="2",
                  alphas="0,1", tokens="4", param="", by="retrieval")  # fmt: skip
    line = line_of(given_, op)
    check_line(line, tmp_path)
    values = _parsed(line)
    assert values["heads"] == ["L0H0,L1H1"] and values["model"] == RETRIEVAL
    assert (values["n"], values["seed"], values["controls"]) == (5, -3, 2)
    assert values["task"] == task
    if "over" in op.fields:
        assert values["keys"] == "span:needle"
    if "at" in op.fields:
        assert values["at"] == "last"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(st.characters(exclude_characters="\0\n\r", exclude_categories=["Cs"]),
                        min_size=1).filter(str.strip), min_size=1, max_size=4))  # fmt: skip
def test_own_prompts_reach_the_command_as_they_were_typed(texts):
    line = line_of(form(texts=texts), OPERATIONS["zero"])
    assert list(_parsed(line)["prompt"]) == texts and _parsed(line)["task"] is None
    # As shown for a terminal, too.
    assert shlex.split(shlex.join(line)) == line


def test_what_cannot_be_is_refused_with_what_to_do(library):
    with pytest.raises(UsageError, match="basket"):
        line_of(Form((), (), "needle", (), {}), OPERATIONS["zero"])
    with pytest.raises(UsageError, match="needle has none") as caught:
        line_of(form(), OPERATIONS["mean"])
    assert "ioi" in caught.value.hint
    with pytest.raises(RunError, match="holds no intervention"):
        shown(library.open("rank"), None)


def test_an_intervention_loads_the_model_as_the_run_did(library):
    command = "headscope rank sink -m zoo:needle --dtype=float32 --heads 'L1H0' --attn eager"
    want = ("--model", "zoo:needle", "--dtype", "float32", "--attn", "eager")
    assert source_of({"command": command}) == want
    assert source_of({"command": "headscope 'broken", "model": "m"}) == ("--model", "m")
    assert source_of({"command": "headscope rank sink", "model": "m"}) == ("--model", "m")
    rank = library.open("rank").info
    assert (task_of(rank), detector_of(rank)) == ("needle", "retrieval")
    assert task_of({"key": {"tasks": [{"task": "RepeatedTokens(length=50)"}]}}) == "repeated-tokens"
    assert task_of({"task": "own prompts"}) == "needle"
    made = form_of({"basket": "L1H0", "n": "4", "run": "x"}, rank, "a\n\n b ")
    assert made.texts == ("a", " b ") and made.values == {"by": "retrieval", "n": "4"}


# ---- what is drawn


def test_the_heads_of_every_kind_of_run_are_found(library):
    want = {"sets": "L0H0 L1H0", "needle": "L1H0 L1H2", "one": "L1H0", "pairs": "L2H0 L2H1",
            "verdict": "L1H0 L1H1", "steer": "L1H0", "sweep": "L1H0"}  # fmt: skip
    for name, heads in want.items():
        run = library.open(name)
        assert set(heads_of(run.info, run.facts)) == set(heads.split()), name


def graphs(parts):
    return [c.figure for part in parts for c in [part, *part._traverse()]
            if type(c).__name__ == "Graph"]  # fmt: skip


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", [n for n in RUNS if n != "rank"])
def test_every_result_is_drawn_with_few_elements(library, name, theme):
    from dash import html

    parts = shown(library.open(name), theme)
    whole = html.Div(parts)
    assert len(list(whole._traverse())) < 300 and graphs(parts)
    for figure in graphs(parts):
        json.loads(figure.to_json())
    words = json.dumps(
        whole.to_plotly_json(), default=lambda c: getattr(c, "to_plotly_json", str)()
    )
    assert "Figcaption" in words


def trace_of(figure, name):
    return next(t for t in figure.data if name in t.name)


def test_controls_stand_on_the_axis_of_the_effect(library):
    rows = {r["set"]: r for r in rows_of(library, "needle")}
    figure = graphs(shown(library.open("needle"), "light"))[0]
    mine = trace_of(figure, "95 %")
    named = ["chosen", "L1H0", "L1H2", "without L1H0", "without L1H2"]
    assert list(mine.x) == [rows[n]["effect"] for n in named]
    ends = [rows[n]["ci_hi"] - rows[n]["effect"] for n in named]
    assert list(mine.error_x.array) == pytest.approx(ends)
    assert list(mine.error_x.arrayminus) == pytest.approx(
        [rows[n]["effect"] - rows[n]["ci_lo"] for n in named]
    )
    means = trace_of(figure, "their mean")
    named = ["random, mean", "L1H0, random, mean", "L1H2, random, mean"]
    assert list(means.x) == [rows[n]["effect"] for n in named]
    drawn = {frozenset(r["heads"].split()): r["effect"] for r in rows.values()
             if r["kind"] == "random"}  # fmt: skip
    assert len(set(drawn.values())) == 1 < len(rows) and max(ends) > 1e-6
    singles = trace_of(figure, "random heads")
    first = [x for x, y in zip(singles.x, singles.y, strict=True) if y < 0.5]
    assert sorted(first) == sorted(drawn.values())
    assert {t.xaxis for t in figure.data} == {None}  # one axis for all


def test_a_run_without_single_draws_is_drawn_by_its_mean():
    figure = forest([Line("L1H0", -1.0, -2.0, -0.5, (), -0.1)], unit="nats")
    assert [t.name for t in figure.data] == ["their mean", "the heads, with 95 % interval"]
    lone = forest([Line("<b>x</b>", -1.0)], unit="nats")
    assert lone.layout.yaxis.ticktext == ("&lt;b&gt;x&lt;/b&gt;",)
    assert list(lone.data[0].error_x.array) == [0.0]


def test_a_curve_has_the_value_at_each_strength(library):
    every = measured(library.open("sweep").facts, "rows")
    rows = [r for r in every if r["measure"] == "KL on answers"]
    figure = dose(list(reversed(rows)))
    mine = trace_of(figure, "95 %")
    assert list(mine.x) == [0, 1, 2] and list(mine.y) == [r["with"] for r in rows]
    assert mine.y[1] == pytest.approx(0, abs=1e-9)  # strength 1 changes nothing
    old = [
        {k: v for k, v in r.items() if not k.startswith(("ci", "control_changes"))} for r in rows
    ]
    assert list(dose(old).data[-1].error_y.array) == [0, 0, 0]
    singles = [t for t in changes(rows).data if t.name == "random heads"]
    assert [list(t.x) for t in singles] == [r["control_changes"] for r in rows]


WORDS = st.lists(st.sampled_from(["a", "b", "c", " ", "\n"]), max_size=12).map("".join)


@given(WORDS, WORDS)
def test_word_marks_lose_nothing_and_mark_only_what_differs(before, after):
    mine, other = pieces(before, after)
    assert "".join(t for t, _ in mine) == before and "".join(t for t, _ in other) == after
    same = [[w for t, new in some if not new for w in t.split()] for some in (mine, other)]
    assert same[0] == same[1]
    if before == after:
        assert not any(new for _, new in [*mine, *other])


# ---- the page


def opened(page, address):
    """Go there, and wait for the form."""
    show(page, address)
    page.wait_for_selector("#intervene-op")


def until(page, script):
    page.wait_for_function(f"() => {script}", timeout=60_000)


@pytest.mark.slow
def test_a_result_stands_beside_the_page_s_own_form_in_both_themes(root, page):
    with served_to(page, root) as site:
        for theme in ("light", "dark"):
            opened(page, f"{site}/r/sets/intervene?theme={theme}")
            until(page, "document.querySelector('#intervene-result .js-plotly-plot .main-svg')")
            assert violations(page) == []
        # A server that only reads says so, and shows the command instead of a button.
        assert "only reads" in page.inner_text("#page-intervene")
        assert page.query_selector("#intervene-go") is None
        page.click("text=put these into the basket")
        until(page, "document.getElementById('intervene-command').textContent.includes('--heads')")
        line = page.inner_text("#intervene-command")
        assert "--heads L0H0,L1H0" in line and line.startswith("headscope ablate --joint --each")
        visit(page, "/jobs")
        page.wait_for_selector("#page-jobs >> text=This server only reads")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_ablation_is_estimated_run_and_shown_and_another_cancelled(root, page):
    short = "param=needle:lengths=48&n=3&draws=2"
    with served_to(page, root, jobs=True) as site:
        opened(page, f"{site}/r/rank/intervene?basket=L1H0&{short}")
        until(page, "document.getElementById('intervene-command').textContent.includes('ablate')")
        page.click("#intervene-dry")
        until(page, "/3 prompts of 1\\d\\d tokens/.test("
                    "document.getElementById('intervene-estimate').textContent)")  # fmt: skip
        page.click("#intervene-go")
        page.wait_for_selector("#intervene-result .js-plotly-plot", timeout=60_000)
        text = page.inner_text("#intervene-result")
        assert "--heads L1H0" in text and "100% → 0%" in text and "random heads" in text
        drawn = page.evaluate(
            "() => document.querySelector('#intervene-result .js-plotly-plot')"
            ".data.map(t => t.name)"
        )
        assert drawn == ["random heads of the same layers", "their mean",
                         "the heads, with 95 % interval"]  # fmt: skip
        # The address holds all of it: opened anew it shows the same.
        address = page.url
        assert "result=ablate-zero" in address and "job=" in address
        leave(page)
        opened(page, address)
        page.wait_for_selector("#intervene-result .js-plotly-plot")
        assert "100% → 0%" in page.inner_text("#intervene-result")

        # Long enough to be caught; reopened in the middle nothing is lost.
        opened(page, f"{site}/r/rank/intervene?basket=L0H0,L1H0,L1H1&n=400&op=zero")
        until(page, "document.getElementById('intervene-command').textContent.includes('400')")
        page.click("#intervene-go")
        page.wait_for_selector("#intervene-job [role=progressbar]")
        address = page.url
        leave(page)
        opened(page, address)
        page.wait_for_selector("#intervene-job [role=progressbar]")
        assert page.get_attribute("#nav-jobs", "data-count") == "1"
        page.click("#intervene-job button")
        until(page, "document.getElementById('intervene-job').textContent.includes('cancelled')")
        until(page, "!document.getElementById('nav-jobs').dataset.count")


def test_a_mistake_in_the_form_is_a_line_and_no_job(root, page):
    with served_to(page, root, jobs=True) as site:
        opened(page, f"{site}/r/rank/intervene?basket=L1H0&op=mean")
        until(page, "/needs clean and corrupted/.test("
                    "document.getElementById('intervene-said').textContent)")  # fmt: skip
        assert page.is_disabled("#intervene-go")
        opened(page, f"{site}/r/rank/intervene?basket=L1H0&n=0")
        until(page, "document.getElementById('intervene-said').textContent.includes('--n')")
