"""Ordinary text cut into windows: any file, or sentences of our own where none is given."""

import random
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from interp.errors import InputError
from interp.prompts import Prompt
from interp.tasks import TASKS, Task
from interp.tasks.ids import opening, ordinary_ids, speaks
from interp.tasks.lexicon import haystack_sentences

if TYPE_CHECKING:
    from interp.model import Model


@TASKS.register("text")
@dataclass(frozen=True)
class Text(Task):
    """BOS and a window of text.

    Attributes:
        file: path of a text file; own sentences (random tokens without tokenizer) if empty.
        length: tokens of a window, BOS included. The sink metric is defined on 64.
    """

    file: str = ""
    length: int = 64

    summary: ClassVar[str] = "windows of a text file (or of generated sentences)"

    def __post_init__(self) -> None:
        if self.length < 2:
            raise InputError(f"a window needs at least 2 tokens; got {self.length}")

    def prompts(self, model: "Model", n: int, *, seed: int = 0) -> list[Prompt]:
        """See `Task.prompts`."""
        rng = random.Random(seed)
        bos = opening(model)
        size = self.length - len(bos)
        stream = self._stream(model, rng, n * size)
        starts = range(0, len(stream) - size + 1, size)
        if len(starts) < n:
            raise InputError(
                f"{n} windows of {self.length} tokens need {n * size} tokens; "
                f"{self.file or 'the text'} has {len(stream)}",
                hint="lower --n or the task's length",
            )
        spans = {"bos": ((0, 1),)} if bos else {}
        return [
            Prompt((*bos, *stream[s : s + size]), spans, id=f"text-{i}")
            for i, s in enumerate(rng.sample(starts, n))
        ]

    def _stream(self, model: "Model", rng: random.Random, n: int) -> list[int]:
        if self.file:
            return self._file(model)
        # A sentence is at least 8 tokens in any vocabulary that knows words.
        text = " ".join(islice(haystack_sentences(rng), n // 8 + 2))
        if speaks(model, text):
            return list(model.tokenizer(text, add_special_tokens=False).input_ids)
        # A model without words, or with a toy vocabulary: random tokens are its text.
        ids = ordinary_ids(model)
        return [rng.choice(ids) for _ in range(n)]

    def _file(self, model: "Model") -> list[int]:
        if model.tokenizer is None:
            raise InputError(f"a text file needs a tokenizer and {model.name} has none")
        path = Path(self.file)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read as text: {error}") from error
        if not text.strip():
            raise InputError(f"a text file must hold text; {path} is empty")
        return list(model.tokenizer(text, add_special_tokens=False).input_ids)
