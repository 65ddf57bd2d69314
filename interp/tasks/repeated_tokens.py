"""Random tokens, repeated: where previous-token, duplicate-token and induction heads show.

BOS, then `repeats` copies of one block of different random tokens (Olsson et al. 2022 use 25
tokens four times). With one fixed lag a head that looks back by a fixed number of tokens passes
for an induction head; with `vary` the block of each prompt has another length, and the shuffled
control of the detectors tells the two apart in any case.
"""

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from interp.errors import InputError
from interp.prompts import Prompt
from interp.tasks import TASKS, Task
from interp.tasks.ids import opening, ordinary_ids, sample_ids

if TYPE_CHECKING:
    from interp.model import Model


@TASKS.register("repeated-tokens")
@dataclass(frozen=True)
class RepeatedTokens(Task):
    """BOS and copies of a random block.

    Attributes:
        length: tokens of a block.
        repeats: copies, at least 2.
        vary: let block lengths range over ±40 % from prompt to prompt.
    """

    length: int = 25
    repeats: int = 4
    vary: bool = False

    summary: ClassVar[str] = "random tokens, repeated (previous-token, duplicate, induction)"
    spans: ClassVar[tuple[str, ...]] = ("first", "repeats")
    target: ClassVar[str] = "repeats"

    def __post_init__(self) -> None:
        if self.length < 2 or self.repeats < 2:
            raise InputError(
                f"a block needs 2 tokens and 2 copies at least; got {self.length} x {self.repeats}"
            )

    def prompts(self, model: "Model", n: int, *, seed: int = 0) -> list[Prompt]:
        """See `Task.prompts`."""
        rng = random.Random(seed)
        ids, bos = ordinary_ids(model), opening(model)
        out = []
        for i in range(n):
            length = self.length
            if self.vary:
                length = max(2, round(length * rng.uniform(0.6, 1.4)))
            block = sample_ids(rng, ids, length)
            tokens = (*bos, *block * self.repeats)
            start = len(bos)
            spans = {
                "first": ((start, start + length),),
                "repeats": ((start + length, len(tokens)),),
            }
            if bos:
                spans["bos"] = ((0, 1),)
            out.append(Prompt(tokens, spans, id=f"repeated-{i}", meta={"length": length}))
        return out
