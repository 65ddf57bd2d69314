"""Patching methods on pairs: shared by `ablate`, `patch` and `attribute`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from app.catalog import check
from app.exits import usage
from app.headset import HeadSet
from app.keep import Answer, Keeping, kept, key_of
from app.loading import Source
from app.steps import steps
from app.subject import Subject, check_answers, check_pairs
from interp.errors import InputError

if TYPE_CHECKING:
    from interp.headid import HeadId
    from interp.model import Model
    from interp.scores import HeadScores
    from patching.method import Method
    from patching.pairs import Pairs


@dataclass(frozen=True)
class PairWork:
    """A method on pairs.

    Attributes:
        source: the model.
        subject: the task.
        heads: which heads; only methods that measure head by head can be told.
        method: name of the method.
        metric: name of the metric.
        settings: parameters of the method.
    """

    source: Source
    subject: Subject
    heads: HeadSet | None
    method: str
    metric: str
    settings: Mapping[str, Any]

    def check(self) -> "Method":
        """Refuse what can be refused without a model.

        Raises:
            UsageError: a task without pairs, or a value that does not fit.
            UnknownNameError: no such metric.
            PromptFileError: own pairs without the answers that the metric needs.
        """
        check("metric", self.metric)
        check_pairs(self.subject)
        if self.subject.own is not None:
            from interp.metrics import METRICS

            check_answers(self.subject.own, METRICS[self.metric])
        return self.made()

    def made(self) -> "Method":
        """The method with its parameters."""
        from patching.method import make_method

        try:
            return make_method(self.method, self.settings)
        except InputError as error:
            raise usage(error) from error

    def run(self, keeping: Keeping, model: "Model", ids: "list[HeadId] | None" = None) -> Answer:
        """Effects of heads on pairs, from a run if there is one.

        Args:
            keeping: where and whether the answer is kept.
            model: the model.
            ids: only these heads, of `ablate` and `patch`; every head if None.
        """
        from patching.pairs import Pairs

        asked, method = self.subject, self.made()
        listed = asked.pairs(model)
        data = Pairs(
            model, listed, metric=self.metric, batch_size=asked.batch_size,
            tower=asked.tower or next(iter(model.towers)),
        )  # fmt: skip
        both = [p for pair in listed for p in (pair.clean, pair.corrupted)]
        key = key_of(
            model, self.method, settings=dict(self.settings), metric=self.metric,
            heads=None if ids is None else [str(h) for h in ids], **asked.key(both),
        )  # fmt: skip

        def compute() -> Answer:
            with steps("heads", quiet=keeping.quiet) as report:
                if ids is None:
                    table = method.scores(data, progress=report)
                else:
                    table = _some(model, data, self.settings, ids, report)
            return Answer({table.detector: table}, {"notes": _notes(table)})

        from app.sights import BOXES, Sights

        looks = Sights(
            model, lambda: [p.clean for p in listed], asked.clean_lines, asked.tower, BOXES
        )  # fmt: skip
        return kept(keeping, key, compute, looks, task=asked.name, seed=asked.seed)


def _some(
    model: "Model", data: "Pairs", settings: Mapping[str, Any], ids: "list[HeadId]", report: Any
) -> "HeadScores":
    from patching.engine import head_effects

    return head_effects(
        model, data, heads=ids, tower=data.tower, progress=report, **settings
    )  # fmt: skip


def _notes(table: "HeadScores") -> list[str]:
    about = table.provenance
    notes = []
    if about.get("clean") is not None and about.get("corrupted") is not None:
        notes.append(f"clean {about['clean']:.4g}, corrupted {about['corrupted']:.4g}")
        if about["clean"] == about["corrupted"]:
            notes.append("these are equal, so that no share of a difference is recovered")
    if "verified" in about:
        notes.append(str(about["verified"]))
    return notes
