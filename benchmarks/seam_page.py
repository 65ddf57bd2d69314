"""Outcomes of `benchmarks/seam.py` and the page made of them, `docs/architectures.md`."""

from collections import Counter
from dataclasses import dataclass, field

CATEGORIES = (
    "decoder",
    "encoder",
    "encoder-decoder",
    "vision-language",
    "vision",
    "audio",
)


@dataclass
class Outcome:
    """What became of one model type.

    Attributes:
        status: `pass`; `fail`: an identity does not hold; `unreached`: attention that no backend
            reaches; `none`: nothing that looks like attention; `unbuilt`: no tiny model;
            `unfed`: no example input; `crash`: an error on the way.
        towers: name, layers with attention, layers, heads, how reached.
        reason: for all but `pass`, why, in one line.
        equal: whether the output kept its bits with all readings installed.
        observed_only: towers whose calls are not one for each prompt: no reading per prompt.
        worst: largest deviation of any of the doctor's identities.
        partly: attention-like modules of a passing model that are not read.
    """

    type: str
    status: str
    cls: str = ""
    family: str = ""
    category: str = ""
    towers: list[tuple[str, int, int, int, str]] = field(default_factory=list)
    equal: bool | None = None
    observed_only: list[str] = field(default_factory=list)
    worst: float | None = None
    reason: str = ""
    partly: list[str] = field(default_factory=list)
    seconds: float = 0.0
    parameters: int = 0


TITLES = {
    "decoder": "Decoders",
    "encoder": "Encoders",
    "encoder-decoder": "Encoder-decoders",
    "vision-language": "Vision and language",
    "vision": "Vision",
    "audio": "Audio",
}
OTHERS = {
    "fail": "An identity does not hold",
    "unreached": "Attention that is not reached",
    "crash": "An error on the way",
    "unfed": "No example input could be made",
    "unbuilt": "No tiny model could be built",
    "none": "Nothing that looks like attention",
}


def page(outcomes: list[Outcome]) -> str:
    """The outcomes as `docs/architectures.md`."""
    import torch
    import transformers

    from benchmarks.tiny_overrides import REASONS

    good = [o for o in outcomes if o.status == "pass"]
    counts = Counter(o.status for o in outcomes)
    families = {o.family for o in good}
    examined = counts["pass"] + counts["fail"] + counts["unreached"] + counts["crash"]
    lines = [
        "# Architectures",
        "",
        f"Of the {len(outcomes)} model types that the auto classes of transformers "
        f"{transformers.__version__} name, {examined} could be built tiny and given an input on "
        f"this machine and have attention. **{len(good)} of these pass** ({len(families)} model "
        "families, with their text and vision towers where those are types of their own), without "
        f"code of ours for any of them; {sum(bool(o.partly) for o in good)} of them also hold "
        "attention of another kind, or for another input, that is not read.",
        "",
        "A type passes if, on a model with random weights,",
        "",
        "1. every tensor of the output with all readings of every tower installed (mass on the "
        "previous token, on a span and per key, entropy, distance, norm of z) equals the output "
        "without, bit for bit, and",
        "2. `interp.load(model).doctor()` passes: each attention layer called as often as "
        "expected, rows summing to one (or to at most one, with learned sinks), pattern @ v equal "
        "to z, heads through W_O equal to the attention output, no mass on later tokens or on "
        "padding, log-sum-exp and appended columns equal to the recomputed ones.",
        "",
        "Real weights are larger, not of another kind; `headscope doctor --model M` makes the same "
        "checks on them. Layers reached by `interface` are seen at the function that transformers "
        "looks up by name; those reached by `functions` compute attention inside their own module, "
        "and where they do it by `softmax` only the pattern is seen, so that pattern @ v cannot be "
        "compared with z.",
        "",
        f"Made by `python benchmarks/seam.py --write` with torch {torch.__version__} and "
        f"transformers {transformers.__version__} on a CPU. Not to be edited by hand.",
        "",
        "| | types |",
        "|---|---|",
        *(f"| {TITLES[c]} | {sum(o.category == c for o in good)} |" for c in CATEGORIES),
        f"| **pass** | **{len(good)}** |",
        *(f"| {title} | {counts[s]} |" for s, title in OTHERS.items() if counts[s]),
        "",
    ]
    for category in CATEGORIES:
        rows = [o for o in good if o.category == category]
        lines += [
            f"## {TITLES[category]}",
            "",
            "Towers are given as layers × heads; k/n layers means that k of n have attention, † "
            "that the model holds attention that is not read (listed below).",
            "",
            "| type | class | towers | reached by | deviations |",
            "|---|---|---|---|---|",
            *(
                f"| {o.type} | {o.cls} | {_towers(o)} | "
                f"{', '.join(sorted({t[4] for t in o.towers}))} | {_bound(o.worst)} |"
                for o in rows
            ),
            "",
        ]
    windows = [f"{o.type} ({', '.join(o.observed_only)})" for o in good if o.observed_only]
    lines += [
        "## Observed, without readings per prompt",
        "",
        "In these towers a call is not one prompt's: they attend by windows, over all images at "
        "once, or call a layer in several rounds. Their calls are observed and pass the doctor; a "
        "reading per prompt is refused with an error.",
        "",
        ", ".join(windows) + ".",
        "",
    ]
    partly = [o for o in good if o.partly]
    lines += [
        "## Passing, but not wholly read",
        "",
        "These modules of passing models look like attention and are not read. The model says so "
        "itself, in `model.structure.unreached` and in the doctor's report. Some are reached when "
        "the input has the sound or video that the example lacks; linear attention and pooling "
        "by `nn.MultiheadAttention` are not.",
        "",
        "| type | not read |",
        "|---|---|",
        *(f"| {o.type} | {', '.join(o.partly)}{_because(o, REASONS)} |" for o in partly),
        "",
        "# Not passing",
        "",
    ]
    for status, title in OTHERS.items():
        rows = [o for o in outcomes if o.status == status]
        if not rows:
            continue
        lines += [f"## {title}", "", "| type | class | reason |", "|---|---|---|"]
        for o in rows:
            reason = REASONS.get(o.type) or _short(o.reason)
            lines.append(f"| {o.type} | {o.cls} | {reason} |")
        lines.append("")
    return "\n".join(lines)


def _because(o: Outcome, reasons: dict[str, str]) -> str:
    return f": {reasons[o.type]}" if o.type in reasons else ""


def _towers(o: Outcome) -> str:
    towers = ", ".join(
        f"{name} {n if k == n else f'{k}/{n}'}×{heads}" for name, k, n, heads, _ in o.towers
    )
    return towers + (" †" if o.partly else "")


def _short(reason: str) -> str:
    """A reason for one cell of a table."""
    if "requires the" in reason and "library" in reason:
        return (
            "needs a package that is not installed: " + reason.split("requires the ")[1].split()[0]
        )
    if "look like it: none" in reason:
        return "no attention"
    cut = reason.split("first met ")[-1].replace("|", "\\|")
    return cut if len(cut) <= 160 else cut[:157] + "…"


def _bound(worst: float | None) -> str:
    """A round bound on the worst deviation: its digits differ between processors."""
    return next((f"< {b:.0e}" for b in (1e-6, 1e-5, 1e-4) if (worst or 0) < b), f"{worst:.0e}")
