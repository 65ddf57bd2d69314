"""Images and boxes as a line of a prompt file names them, and whether a model reads such a line."""

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.errors import PromptFileError

if TYPE_CHECKING:
    from interp.model import Model

Box = tuple[float, float, float, float]


def images_of(content: Mapping[str, Any], folder: Path, place: str) -> tuple[Path, ...]:
    """The files of a line's images.

    Args:
        content: the line.
        folder: what paths are relative to.
        place: file and line, for error texts.

    Raises:
        PromptFileError: not paths, or both `image` and `images`.
    """
    if "image" in content and "images" in content:
        raise PromptFileError(f"{place}: a prompt has either image or images; got both")
    key = "image" if "image" in content else "images"
    if key not in content:
        return ()
    given = [content[key]] if key == "image" else content[key]
    if not isinstance(given, list) or not given:
        raise PromptFileError(f"{place}: images must be a list of paths; got {_brief(given)}")
    for path in given:
        if not isinstance(path, str) or not path.strip() or "\0" in path:
            raise PromptFileError(
                f"{place}: an image must be the path of a file; got {_brief(path)}"
            )
        if "://" in path or path.startswith("data:"):
            raise PromptFileError(
                f"{place}: an image must be a file on this machine; got {_brief(path)}",
                hint="download it first",
            )
    return tuple(folder / path for path in given)


def boxes_of(content: Mapping[str, Any], images: int, place: str) -> dict[str, tuple[int, Box]]:
    """The boxes of a line, by name; whether they fit the images is seen when these are opened.

    Args:
        content: the line.
        images: how many images it has.
        place: file and line, for error texts.

    Raises:
        PromptFileError: not boxes, or boxes without an image.
    """
    given = content.get("boxes")
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise PromptFileError(
            f"{place}: boxes must map names to boxes; got {_brief(given)}",
            hint='write {"needle": [left, top, right, bottom]}',
        )
    if not images:
        raise PromptFileError(f"{place}: boxes need an image; the prompt has none")
    out = {}
    for name, value in given.items():
        image, box = value if isinstance(value, list) and len(value) == 2 else (0, value)
        fits = isinstance(box, list) and len(box) == 4 and all(map(_number, box))
        if not fits or not isinstance(image, int) or isinstance(image, bool):
            raise PromptFileError(
                f"{place}: box {name!r} must be [left, top, right, bottom] or [image, box]; got "
                f"{_brief(value)}"
            )
        if not 0 <= image < images:
            raise PromptFileError(
                f"{place}: box {name!r} must be on one of the {images} images, from 0; got {image}"
            )
        left, top, right, bottom = (float(x) for x in box)
        out[name] = image, (left, top, right, bottom)
    return out


def reads_images(model: "Model") -> bool:
    """Whether a model takes pixels."""
    return "pixel_values" in inspect.signature(model.hf.forward).parameters


def check_read(model: "Model", images: int, *, written: bool, place: str) -> None:
    """Refuse images without text, or text without images, that a model has no use for.

    Args:
        model: the model.
        images: how many images the line has.
        written: whether it has a text or tokens.
        place: file and line, for error texts.

    Raises:
        PromptFileError: the line lacks what the model reads.
    """
    if not written and model.reads_tokens and reads_images(model):
        raise PromptFileError(
            f"{place}: {model.name} reads a text with its images; got none",
            hint='{"image": ..., "text": ...} in a JSONL file, or --prompt TEXT with --image',
        )
    if not images and not model.reads_tokens:
        raise PromptFileError(
            f"{place}: {model.name} reads images alone; got a prompt without any",
            hint='{"image": ...} in a JSONL file, or --image PATH',
        )


def check_placeholders(tokens: Sequence[int], model: "Model", place: str) -> None:
    """Refuse a prompt without images that holds the placeholder of one.

    Raises:
        PromptFileError: the model would read the placeholder as a word.
    """
    names = ("image_token_id", "image_token_index")
    marks = {getattr(model.config, name, None) for name in names} - {None}
    count = sum(token in marks for token in tokens)
    if count:
        raise PromptFileError(
            f"{place}: every placeholder of an image needs one; got {count} placeholders and no "
            "image",
            hint='"image": "a.png" in the line of a JSONL file, or --image PATH',
        )


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"
