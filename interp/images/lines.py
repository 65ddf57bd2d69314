"""Images and boxes as a line of a prompt file names them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from interp.errors import PromptFileError

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


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"
