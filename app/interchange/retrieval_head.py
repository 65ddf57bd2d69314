"""Score files of nightdessert/Retrieval_Head (Wu et al. 2404.15574): one JSON object a model.

    {"LAYER-HEAD": [score of each trial that the model answered, …], …}

The score of a trial is the share of the needle's tokens that the head copied by attending to them,
which is what detector `retrieval` counts, so both compare.
"""

import hashlib
import re
from pathlib import Path

import numpy as np

from app.interchange import FORMATS, Found, Interchange
from app.interchange.bounded import HEADS, LAYERS, MB, listed, numbers, parsed, read_bytes, whole
from interp.errors import InputError
from interp.headid import HeadId
from interp.scores import HeadScores

SIZE, TRIALS = 64 * MB, 100_000
_KEY = re.compile(r"([0-9]{1,5})-([0-9]{1,5})")


def read(path: Path, model: str | None) -> Found:
    """A score file as a table of detector `retrieval`, with the score of every trial.

    Heads may have unequally many trials; what is missing is undefined.

    Raises:
        InputError: not such a file, or the model was not named.
        RunError: it cannot be read.
    """
    if not model:
        raise InputError(
            f"a model must be named: {path.name} does not say whose scores it holds",
            hint="--model NAME",
        )
    data = read_bytes(path, SIZE)
    content = parsed(data, path, dict)
    trials: dict[HeadId, np.ndarray] = {}
    for key, scores in content.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise InputError(f"{path} must name heads as LAYER-HEAD; got {key[:40]!r}")
        layer, head = (whole(int(x), f"{path}: {key}", LAYERS) for x in match.groups())
        where = f"{path}: {layer}-{head}"
        if HeadId(layer, head) in trials:
            raise InputError(f"{where} must be there once; it is there twice")
        entries = listed(scores, where, TRIALS)
        trials[HeadId(layer, head)] = numbers(entries, where, 0.0, 1.0)
    n = max(map(len, trials.values()), default=0)
    if n == 0:
        raise InputError(f"{path} must hold scores of heads; it holds none")
    if len(trials) > LAYERS * HEADS // 4 or n * len(trials) > SIZE // 4:
        raise InputError(f"{path} must hold fewer scores: {len(trials)} heads × {n} trials")
    heads = tuple(sorted(trials))
    per_example = np.full((n, len(heads)), np.nan)
    for i, head_id in enumerate(heads):
        per_example[: len(trials[head_id]), i] = trials[head_id]
    table = HeadScores(
        detector="retrieval",
        heads=heads,
        per_example=per_example,
        null_per_example=None,
        examples=tuple(f"trial-{i}" for i in range(n)),
        threshold=0.1,
        unit="share of the needle copied by looking at it",
        range=(0.0, 1.0),
        provenance={"model": model, "imported": "retrieval-head", "file": path.name},
    )
    return Found((table,), model, hashlib.sha256(data).hexdigest(), {"file": path.name})


FORMATS.register("retrieval-head")(
    Interchange("scores of trials by head, from nightdessert/Retrieval_Head", read=read)
)
