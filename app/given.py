"""Own prompts as a command line gives them: a file, texts, images; and what a model must read."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from app.exits import UsageError
from interp.errors import InputError, PromptFileError

if TYPE_CHECKING:
    from interp.model import Model
    from interp.pairfile import PairLine
    from interp.promptfile import Line
    from interp.prompts import Prompt, PromptPair

ALWAYS, MAYBE, NEVER = "always", "maybe", "never"
_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:/")
_JSONL = '--prompts FILE.jsonl holds many: {"image": "a.png", "text": "..."} a line'


@dataclass(frozen=True)
class Given:
    """What a command line says of own prompts.

    Attributes:
        place: file of prompts, or of pairs.
        texts: prompts as text.
        images: images of the one text there is; without text each is a prompt of its own, for
            models that read images alone. Of a pair, those of its clean prompt.
        corrupted: images of the corrupted prompt of a pair.
        answer: what should follow the one text there is, or the clean prompt of a pair.
        wrong: what that is compared with, of a pair.
    """

    place: Path | None = None
    texts: Sequence[str] = ()
    images: Sequence[Path] = ()
    corrupted: Sequence[Path] = ()
    answer: str | None = None
    wrong: str | None = None

    @property
    def options(self) -> list[str]:
        """The options that say anything."""
        said = {
            "--prompts": self.place is not None, "--prompt": self.texts, "--image": self.images,
            "--corrupted-image": self.corrupted, "--answer": self.answer is not None,
            "--wrong": self.wrong is not None,
        }  # fmt: skip
        return [name for name, there in said.items() if there]

    def lines(self) -> "Sequence[Line] | None":
        """The prompts, if there are any; pairs are refused.

        Raises:
            UsageError: texts and a file, or images with several texts or with a prompt that has
                its own.
            PromptFileError: prompts that cannot be read, or an image that is not there.
        """
        return self.read(NEVER)[0]

    def read(self, pairs: str) -> "tuple[Sequence[Line] | None, Sequence[PairLine] | None]":
        """The prompts or the pairs, if there are any.

        Args:
            pairs: what they are: `NEVER`, `MAYBE` (as the first line of a file says), `ALWAYS`.

        Raises:
            UsageError: options that do not go together.
            PromptFileError: what they name cannot be read, is of the other kind, or an image is
                not there.
        """
        said = self.options
        if "--prompts" in said and set(said) - {"--prompts", "--image"}:
            raise UsageError(f"{said[1]} and --prompts exclude each other; got both")
        if pairs == ALWAYS or self.corrupted or self.wrong is not None:
            if self.place is not None and self.images:
                raise UsageError("--image and --prompts exclude each other for pairs; got both")
            return None, _pair(self) if self.place is None else _file(self.place, ALWAYS)[1]
        lines: Sequence[Line] | None = None
        own: Sequence[PairLine] | None = None
        if self.place is not None:
            lines, own = _file(self.place, NEVER if self.images else pairs)
        elif self.texts:
            lines = _said(self.texts)
        if self.images:
            lines = _with_images(lines, self.images)
        if self.answer is not None:
            if lines is None or len(lines) != 1:
                raise UsageError(f"--answer goes with one --prompt; got {len(lines or ())}")
            lines = [replace(lines[0], answer=self.answer)]
        _there(lines or ())
        return lines, own


def _said(texts: Sequence[str]) -> "list[Line]":
    from interp.promptfile import Line

    named = enumerate(texts, 1)
    return [Line(f"--prompt {i}", text, None, id=f"prompt-{i}") for i, text in named]


def _with_images(lines: "Sequence[Line] | None", images: Sequence[Path]) -> "list[Line]":
    from interp.promptfile import Line

    if lines is None:
        named = enumerate(images, 1)
        return [
            Line(f"--image {image}", None, None, id=f"image-{i}", images=(image,))
            for i, image in named
        ]
    if len(lines) != 1:
        raise UsageError(f"--image goes with one text; got {len(lines)}", hint=_JSONL)
    [line] = lines
    if line.images or line.text is None:
        what = "has images of its own" if line.images else "is token ids"
        raise UsageError(f"--image goes with a text; {line.place} {what}", hint=_JSONL)
    return [replace(line, images=tuple(images))]


def _pair(given: Given) -> "list[PairLine] | None":
    """One text on two images."""
    from interp.pairfile import PairLine
    from interp.promptfile import Line

    if not given.options:
        return None
    texts, images, corrupted = given.texts, given.images, given.corrupted
    if not images or not corrupted or len(texts) > 1:
        raise UsageError(
            f"a pair is one --prompt, --image and --corrupted-image; got {len(texts)}, "
            f"{len(images)} and {len(corrupted)}",
            hint='--prompts FILE.jsonl holds many: {"clean": ..., "corrupted": ...} a line',
        )
    text = texts[0] if texts else None
    clean, other = (
        Line(place, text, None, id="pair", images=tuple(some))
        for place, some in (("--image", images), ("--corrupted-image", corrupted))
    )
    _there([clean, other])
    return [PairLine("--prompt", clean, other, given.answer, given.wrong, "pair")]


def _file(
    place: Path, pairs: str
) -> "tuple[Sequence[Line], None] | tuple[None, Sequence[PairLine]]":
    """The prompts of a file, or its pairs."""
    from interp import pairfile, promptfile
    from interp.jsonlines import bytes_of

    data, name = bytes_of(place)
    found = pairfile.holds_pairs(data)
    if pairs == ALWAYS or (pairs == MAYBE and found):
        made = pairfile.parse(data, name)
        _there(line for pair in made for line in (pair.clean, pair.corrupted))
        return None, made
    if found:
        raise PromptFileError(
            f"{name}: prompts are needed; these are pairs, clean and corrupted",
            hint='pairs are for ablate, patch and attribute; a prompt is {"text": ...}',
        )
    lines = promptfile.parse(data, name)
    _there(lines)
    return lines, None


def _there(lines: "Iterable[Line]") -> None:
    """Refuse images that are not there, before a model is loaded."""
    for line in lines:
        for image in line.images:
            if _ADDRESS.match(str(image)):  # a path has lost one of the two slashes
                raise PromptFileError(
                    f"{line.place}: an image must be a file on this machine; got {image}",
                    hint="download it first",
                )
            if not image.is_file():
                what = "that is a folder" if image.is_dir() else "there is no such file"
                error = FileNotFoundError(str(image))
                raise PromptFileError(
                    f"{line.place}: an image must be in a file; {image}: {what}"
                ) from (None if image.is_dir() else error)


def made_prompts(lines: "Sequence[Line]", model: "Model") -> "list[Prompt]":
    """Own prompts for a model, texts and images as it needs them.

    Raises:
        PromptFileError: prompts that do not fit the model.
    """
    from interp.promptfile import to_prompts

    return to_prompts(lines, model)


def made_pairs(lines: "Sequence[PairLine]", model: "Model") -> "list[PromptPair]":
    """Own pairs for a model; see `made_prompts`."""
    from interp.pairfile import to_pairs

    return to_pairs(lines, model)


def check_speaks(model: "Model", what: str) -> None:
    """Refuse models that produce no tokens.

    Raises:
        InputError: the model reads images alone.
    """
    if not model.reads_tokens:
        raise InputError(
            f"{what} measures tokens that a model produces; {model.name} reads images alone and "
            f"produces none",
            hint="headscope rank reads its heads",
        )
