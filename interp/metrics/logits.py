"""Metrics on the logits of the next token: difference, probability, rank, divergence."""

from torch import Tensor

from interp.metrics import METRICS, Bound, Metric


def _pick(logits: Tensor, tokens: Tensor) -> Tensor:
    index = tokens.expand(logits.shape[:-1])[..., None]
    return logits.gather(-1, index)[..., 0]


class LogitDifference(Metric):
    """Logit of the answer minus logit of the wrong answer."""

    name, unit, linear, needs_wrong = "logit-difference", "logits", True, True
    summary = "logit of the answer minus that of the wrong answer"

    def of(self, logits: Tensor, bound: Bound) -> Tensor:
        """See `Metric`."""
        assert bound.wrong is not None
        return _pick(logits, bound.answer) - _pick(logits, bound.wrong)


class Logit(Metric):
    """Logit of the answer minus the mean logit."""

    name, unit, linear = "logit", "logits", True
    summary = "logit of the answer minus the mean logit"

    def of(self, logits: Tensor, bound: Bound) -> Tensor:
        """See `Metric`."""
        return _pick(logits, bound.answer) - logits.mean(-1)


class LogProb(Metric):
    """Log-probability of the answer; its negative is the loss."""

    name, unit = "log-prob", "nats"
    summary = "log-probability of the answer"

    def of(self, logits: Tensor, bound: Bound) -> Tensor:
        """See `Metric`."""
        return _pick(logits.log_softmax(-1), bound.answer)


class Prob(Metric):
    """Probability of the answer; cannot see what lowers a probability that is already 0."""

    name, unit = "prob", "probability"
    summary = "probability of the answer"

    def of(self, logits: Tensor, bound: Bound) -> Tensor:
        """See `Metric`."""
        return _pick(logits.softmax(-1), bound.answer)


class Accuracy(Metric):
    """1 where the answer has the largest logit; ties count as wrong unless the answer comes first.

    Not differentiable.
    """

    name, unit = "accuracy", "share correct"
    summary = "1 where the answer comes first, else 0"

    def of(self, logits: Tensor, bound: Bound) -> Tensor:
        """See `Metric`."""
        return (logits.argmax(-1) == bound.answer).to(logits.dtype)


class Rank(Metric):
    """Number of tokens with a larger logit than the answer; 0 is best. Not differentiable."""

    name, unit = "rank", "tokens before the answer"
    summary = "number of tokens placed before the answer"

    def of(self, logits: Tensor, bound: Bound) -> Tensor:
        """See `Metric`."""
        return (logits > _pick(logits, bound.answer)[..., None]).sum(-1).to(logits.dtype)


class Divergence(Metric):
    """KL(unedited ‖ edited) of the next token, in nats, summed over the vocabulary."""

    name, unit, compares, needs_answer = "kl", "nats", True, False
    summary = "KL divergence of the edited prediction from the unedited one"

    def of(self, logits: Tensor, bound: Bound) -> Tensor:
        """See `Metric`."""
        assert bound.reference is not None
        p = bound.reference.log_softmax(-1)
        return (p.exp() * (p - logits.log_softmax(-1))).sum(-1)


for metric in (
    LogitDifference(), Logit(), LogProb(), Prob(), Accuracy(), Rank(), Divergence(),
):  # fmt: skip
    METRICS.register(metric.name)(metric)
