"""What somebody typed, as prompts: checked, and written as the lines of a file of prompts.

A text is one prompt, or several as JSONL, where its first line is a mapping that says a prompt.
Whatever is in it is text: nothing of it is read as a file, a path or an image.
"""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from app.loading import Source
from interp.errors import InputError

if TYPE_CHECKING:
    from interp.model import Model
    from interp.promptfile import Line

MOST = 1_000_000
"""Most characters of a text."""
_SHORT = 400
_OPTIONS = ("--device", "--dtype", "--attn", "--revision")


@dataclass(frozen=True)
class Asked:
    """What is to be looked at.

    Attributes:
        source: the model.
        texts: A, and B if there is one.
        chat: whether each is a message to which the tokenizer's chat template is applied.
        generate: tokens to continue each by.
    """

    source: Source
    texts: tuple[str, ...]
    chat: bool = False
    generate: int = 0

    @classmethod
    def read(cls, body: Mapping[str, Any], options: Mapping[str, str] | None = None) -> "Asked":
        """What a page sent.

        Args:
            body: `model`, `texts`, `chat`, `generate`.
            options: of the command that made the run of this model, see `options_of`.

        Raises:
            InputError: it is of another form, too long, or no text.
            UnknownNameError: no such model of the zoo.
        """
        model, texts, generate = body.get("model"), body.get("texts"), body.get("generate", 0)
        if not isinstance(model, str) or not model.strip() or len(model) > 500:
            raise InputError("a model must be named", hint="a folder, a hub name or zoo:NAME")
        check_text(model, "the name of the model")
        if not isinstance(texts, list) or not 1 <= len(texts) <= 2:
            raise InputError("one or two texts are needed")
        for name, text in zip("AB", texts, strict=False):
            check_text(text, f"prompt {name}" if len(texts) > 1 else "the prompt")
        if not isinstance(generate, int) or not 0 <= generate <= 4096:
            raise InputError(f"tokens to generate must lie in 0..4096; got {str(generate)[:20]}")
        given = options or {}
        source = Source(
            model.strip(), given.get("--device", "auto"), given.get("--dtype", "auto"),
            given.get("--attn"), given.get("--revision"), "--offline" in given,
        )  # fmt: skip
        source.check()
        return cls(source, tuple(texts), body.get("chat") is True, generate)


@dataclass(frozen=True)
class Written:
    """Prompts as JSONL holds them.

    Attributes:
        entries: a mapping each.
        notes: what is to be said of them.
    """

    entries: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def short(self) -> bool:
        """Whether the prompts fit a command line."""
        return all(
            set(e) <= {"text", "id"} and len(e.get("text", "")) <= _SHORT
            and all(c.isprintable() or c in "\n\t" for c in e["text"])
            for e in self.entries
        )  # fmt: skip

    @property
    def jsonl(self) -> str:
        """The file that holds them."""
        return "".join(json.dumps(dict(e), ensure_ascii=False) + "\n" for e in self.entries)


def check_text(text: object, what: str) -> str:
    """A text that can be worked with.

    Raises:
        InputError: no text, empty, too long, or not Unicode.
    """
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{what} must be a text that is not empty")
    if len(text) > MOST:
        raise InputError(
            f"{what} must have at most {MOST:,} characters; got {len(text):,}",
            hint="headscope capture --prompts FILE reads longer ones",
        )
    at = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
    if at is not None:
        raise InputError(f"{what} must be Unicode; character {at} is half of a surrogate pair")
    return text


def options_of(info: Mapping[str, Any]) -> dict[str, str]:
    """How the command of a run loaded its model: options to their values."""
    try:
        words = shlex.split(str(info.get("command") or ""))
    except ValueError:
        return {}
    found = {"--offline": ""} if "--offline" in words else {}
    for at, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in _OPTIONS and (equals or at + 1 < len(words)):
            found[name] = value if equals else words[at + 1]
    return found


def is_jsonl(text: str) -> bool:
    """Whether a text is prompts as JSONL rather than one prompt."""
    first = text.lstrip().split("\n", 1)[0]
    try:
        content = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and bool({"text", "tokens", "image", "images"} & set(content))


def written(asked: Asked, model: "Model | None" = None) -> Written:
    """The prompts of what was typed.

    Args:
        asked: what was typed.
        model: whose chat template is applied; needed for that alone.

    Raises:
        InputError: JSONL that holds no prompts, or images; a template that there is not.
    """
    names = ("A", "B") if len(asked.texts) > 1 else ("prompt",)
    entries: list[Mapping[str, Any]] = []
    notes: list[str] = []
    for name, text in zip(names, asked.texts, strict=True):
        if is_jsonl(text):
            lines = _lines(text)
            some = lines[:1] if len(asked.texts) > 1 else lines
            if len(some) < len(lines):
                notes.append(f"{name} holds {len(lines)} prompts: the first is compared")
            entries += [_entry(line, name if len(asked.texts) > 1 else line.id) for line in some]
        elif asked.chat and model is not None:
            entries.append(_through_template(text, name, model))
        else:
            entries.append({"text": text, "id": name})
    return Written(tuple(entries), tuple(notes))


def _lines(text: str) -> "list[Line]":
    from interp.promptfile import parse

    lines = parse(text.encode(), "prompts.jsonl")
    if any(line.images for line in lines):
        raise InputError(
            "prompts of a page hold no images",
            hint="headscope capture --prompts FILE reads them",
        )
    return lines


def _entry(line: "Line", id: str) -> dict[str, Any]:
    body = {"text": line.text} if line.text is not None else {"tokens": list(line.tokens or ())}
    spans = {name: [list(r) for r in ranges] for name, ranges in line.spans.items()}
    answer = list(line.answer) if isinstance(line.answer, tuple) else line.answer
    return {
        **body, "id": id, **({"spans": spans} if spans else {}),
        **({} if answer is None else {"answer": answer}),
    }  # fmt: skip


def has_template(model: "Model") -> bool:
    """Whether the tokenizer has a chat template."""
    return bool(getattr(model.tokenizer, "chat_template", None))


def template_text(text: str, model: "Model") -> str:
    """A message of a user as the chat template writes it.

    Raises:
        InputError: there is no template, or it fails.
    """
    if not has_template(model):
        raise InputError(f"the tokenizer of {model.name} has no chat template")
    try:  # a template is code that came with the model
        return str(
            model.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
        )
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise InputError(f"the chat template of {model.name} failed: {first}") from error


def _through_template(text: str, id: str, model: "Model") -> dict[str, Any]:
    """The text a template makes; token ids where it would not be tokenised to the same."""
    made = template_text(text, model)
    tokenizer: Any = model.tokenizer
    wanted = list(tokenizer(made, add_special_tokens=False).input_ids)
    start = str(getattr(tokenizer, "bos_token", None) or "")
    for form in (made, made.removeprefix(start)):
        if form and list(tokenizer(form).input_ids) == wanted:
            return {"text": form, "id": id}
    return {"tokens": wanted, "id": id}
