"""Which heads of `zoo:shapes-vlm` see, at which depth, and what interventions do to its habits.

    python benchmarks/sight.py                            the tables (some minutes)
    python benchmarks/sight.py --write                    also as docs/sight.md
    python benchmarks/sight.py --only knockout --write    one section alone; the others stay

Knockout: the relative change of the probability of the answer when, in a window of layers, one
group of tokens may not look at another. `question` is the text before the last token, `other
patches` as many random patches as `thing` has, none of them its own.

The conflict set asks for the colour of shapes that have a habitual colour in the world the model
was trained on, and another one here; half of the things are nearly grey. An answer is a
hallucination if it is the habitual colour. Intervals are percentile bootstraps over prompts;
changes are paired. Side effects are measured on ordinary scenes: accuracy, and the divergence of
the first answer token from the plain model's.
"""

import argparse
import random
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

warnings.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from heads.detector import make_detector  # noqa: E402
from heads.makers import make_recipe  # noqa: E402
from heads.scoring import score  # noqa: E402
from heads.verdicts import verdict  # noqa: E402
from interp import load  # noqa: E402
from interp.decode import generate  # noqa: E402
from interp.errors import InputError  # noqa: E402
from interp.model import Model  # noqa: E402
from interp.prompts import Batch, Prompt  # noqa: E402
from interp.recipe import Recipe  # noqa: E402
from interp.tasks import make_task  # noqa: E402
from patching.windows import WindowKnockout, window_knockout  # noqa: E402

Maker = Callable[[Model, Batch], Recipe]
LAYERS = (1, 2, 3)
PAGE = ROOT / "docs" / "sight.md"
FLOWS = (
    *(("image", "last"), ("thing", "last"), ("other patches", "last"), ("question", "last")),
    *(("image", "question"), ("thing", "question"), ("bos", "last")),
)
"""Keys that are hidden, and from which queries."""
WINDOWS = (1, 2, 3)


def by(name: str, **params: object) -> Maker:
    """A maker of recipes by name."""
    return lambda model, batch: make_recipe(name, model, batch, params)


WAYS: dict[str, Maker | None] = {
    "plain": None,
    "VHR, α = 1.5": by("vhr", alpha=1.5, layers=LAYERS),
    "VHR, α = 2 (published)": by("vhr", alpha=2.0, layers=LAYERS),
    "VHR, α = 3": by("vhr", alpha=3.0, layers=LAYERS),
    "VAR, p = 0.6, ρ = 0.5 (published)": by("var", layers=LAYERS),
    "VAR, p = 0.3, ρ = 0.9": by("var", layers=LAYERS, p=0.3, rho=0.9),
    "boost × 2, layers from the third": by("boost", factor=2.0),
    "boost × 8, all layers": by("boost", factor=8.0, layers=(0, *LAYERS)),
    "VCD, image hidden, α = 1": by("vcd"),
    "VCD, image hidden, α = 3": by("vcd", alpha=3.0),
    "VCD, noise at step 500 (published)": by("vcd", blind="noise"),
}


def run(
    model: Model, prompts: Sequence[Prompt], make: Maker | None
) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """Right, habitual (each [example]), and log-probabilities of the first answer token."""
    right, habit, said_by = [], [], []
    for at in range(0, len(prompts), 50):
        some = list(prompts[at : at + 50])
        batch = model.batch(some, side="left")
        recipe = None if make is None else make(model, batch)
        with recipe.on(model, spans=batch) if recipe else nullcontext():
            logits = model.forward(batch.inputs()).logits[:, -1]
            said_by.append(logits.double().log_softmax(-1))
        with recipe.on(model, spans=batch) if recipe else nullcontext():
            outs = generate(model, batch, max_new_tokens=3)
        for prompt, out in zip(some, outs, strict=True):
            text = model.tokenizer.decode([t for t in out if t != 2])
            right.append(text == prompt.meta["right"])
            habit.append(bool(prompt.meta["habit"]) and text == prompt.meta["habit"])
    return np.array(right), np.array(habit), torch.cat(said_by)


def interval(values: np.ndarray, draws: int = 2000) -> str:
    """Mean and 95 % interval, in percent."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(0, len(values), (draws, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return f"{100 * values.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def habits(model: Model, n: int) -> list[str]:
    """The table of hallucination."""
    conflict = {"world": "conflict", "faint": "0.5", "habitual": "yes"}
    hard = make_task("shapes", conflict).prompts(model, n, seed=5)
    easy = make_task("shapes", {"world": "skewed", "faint": "0.1"}).prompts(model, n, seed=6)
    lines = [
        "| way | hallucinated, % | change, points | right, % | ordinary scenes right, % "
        "| KL there, nats |",
        "|---|---|---|---|---|---|",
    ]
    plain: dict[str, tuple[np.ndarray, np.ndarray, torch.Tensor]] = {}
    for name, make in WAYS.items():
        try:
            mine = {"hard": run(model, hard, make), "easy": run(model, easy, make)}
        except InputError as error:
            lines.append(f"| {name} | not applicable: {error} | | | | |")
            continue
        plain = plain or mine
        right, habit, _ = mine["hard"]
        base, now = plain["easy"][2], mine["easy"][2]
        # A token that a recipe rules out has no finite log-probability.
        kl = (base.exp() * (base - now.clamp_min(-30))).sum(-1).mean()
        change = habit.astype(float) - plain["hard"][1].astype(float)
        lines.append(
            f"| {name} | {interval(habit)} | {interval(change)} | {100 * right.mean():.1f} "
            f"| {100 * mine['easy'][0].mean():.1f} | {max(float(kl), 0):.3f} |"
        )
        print(lines[-1], flush=True)
    return lines


def found(model: Model, n: int) -> list[str]:
    """Which heads look at the image, where they point, and whether they matter."""
    task = make_task("shapes", {"world": "even"})
    looks = score(model, "visual-attention", task=task, n=n, batch_size=20)["visual-attention"]
    seen = score(model, "vision-head-divergence", task=task, n=n, batch_size=20)
    vhd = seen["vision-head-divergence"]
    pointing = make_detector("region-grounding", {"measure": "pointing"})
    points = score(model, pointing, task=task, n=n, batch_size=20)["region-grounding"]
    lines = [
        "| head | image mass | points into the right box, % | VHD (position alone) |",
        "|---|---|---|---|",
    ]
    for head in looks.top(8):
        i = looks.heads.index(head)
        lines.append(
            f"| {head} | {looks.values[i]:.3f} | {100 * points.values[i]:.0f} "
            f"| {vhd.values[i]:.2f} ({vhd.null_per_example[:, i].mean():.2f}) |"
        )
    chance = 100 * float(np.nanmean(points.null_per_example))
    lines += ["", f"Chance of pointing into the box: {chance:.1f} %.", ""]
    for detector in ("visual-attention", "vision-head-divergence"):
        said = verdict(model, task=task, detector=detector, n=n, most=8)
        assert said.joint is not None
        lines += [f"Verdict on `{detector}`: {said.message}; together {said.joint.words()}.", ""]
    return lines


def grouped(prompt: Prompt) -> Prompt:
    """The prompt with the token groups of the knockouts as spans."""
    thing, image = set(prompt.positions("thing")), prompt.positions("image")
    rest = [i for i in image if i not in thing]
    others = random.Random(f"others/{prompt.id}").sample(rest, len(thing))
    spans = {
        "question": ((image[-1] + 1, len(prompt) - 1),),
        "other patches": tuple((i, i + 1) for i in sorted(others)),
    }
    return replace(prompt, spans={**prompt.spans, **spans})


def flows(model: Model, n: int) -> list[WindowKnockout]:
    """The curves of all token groups and windows."""
    prompts = [grouped(p) for p in make_task("shapes", {"world": "even"}).prompts(model, n, seed=7)]
    return [
        window_knockout(
            model,
            prompts,
            keys=keys,
            queries=queries,
            window=window,
            target="answer",
            batch_size=50,
        )
        for keys, queries in FLOWS
        for window in WINDOWS
    ]


def depths(model: Model, n: int) -> list[str]:
    """The table of knockouts."""
    n = min(n, 200)
    found = flows(model, n)
    layers = found[0].layers
    sure = 100 * found[0].probability.mean()
    lines = [
        f"Change of the probability of the answer in percent, {n} prompts of the even world; as "
        f"it is, the answer has {sure:.1f} %. A window of w layers around layer l begins at "
        "l − w // 2.",
        "",
        "| cut off | w | " + " | ".join(f"layer {layer}" for layer in layers) + " |",
        "|---" * (2 + len(layers)) + "|",
    ]
    for one in found:
        cells = [interval(one.per_example[:, i]) for i in range(len(layers))]
        lines.append(f"| {one.label} | {one.window} | {' | '.join(cells)} |")
    return lines


def interventions(model: Model, n: int) -> list[str]:
    """The table of hallucination, and what it is about."""
    return [f"{n} prompts of the conflict world and as many ordinary ones.", "", *habits(model, n)]


SECTIONS: dict[str, tuple[str, Callable[[Model, int], list[str]]]] = {
    "heads": ("Heads that look at the image", lambda model, n: found(model, min(n, 60))),
    "knockout": ("Where in depth the image is read", depths),
    "interventions": ("Interventions against habit", interventions),
}


def put(made: dict[str, list[str]]) -> None:
    """Write sections into the page; those that are not made anew stay as they are."""
    old = PAGE.read_text().split("\n## ")[1:] if PAGE.exists() else []
    known = {part.split("\n", 1)[0]: part.split("\n", 1)[1].strip() for part in old}
    known |= {heading: "\n".join(lines).strip() for heading, lines in made.items()}
    parts = [
        "# Vision heads and hallucination on `zoo:shapes-vlm`",
        "Made by `python benchmarks/sight.py --write`; `--only NAME` makes one section anew, of "
        f"{', '.join(SECTIONS)}. The model, its world and its habits are described in "
        "`interp/zoo/train/shapes_vlm.py` and `interp.scenes`.",
    ]
    for heading, _ in SECTIONS.values():
        if heading in known:
            parts += [f"## {heading}", known[heading]]
    PAGE.write_text("\n\n".join(parts) + "\n")


def main() -> None:
    """Run and, if asked, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--n", type=int, default=400)
    parser.add_argument("--only", action="append", choices=tuple(SECTIONS))
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load("zoo:shapes-vlm", device="cpu")
    for name, (heading, make) in SECTIONS.items():
        if name in (args.only or SECTIONS):
            lines = make(model, args.n)
            print("\n".join(lines), flush=True)
            if args.write:  # at once: what comes later may take long, or fail
                put({heading: lines})


if __name__ == "__main__":
    main()
