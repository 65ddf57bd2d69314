"""Prompts with images: what the processor made, and which pixels each token stands for."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.errors import InputError, UnsupportedModelError
from interp.images.files import ImageLike, open_image
from interp.images.layouts import Example, Family, Layout, family_of
from interp.images.patches import Box, PatchMap
from interp.images.plane import Cell, Settings, Size
from interp.images.runs import RunProcessor
from interp.images.spans import Boxes, boxed, check_boxes, check_seen, described, tower_views
from interp.images.tensors import model_inputs, processed, token_ids
from interp.images.words import Characters, covered, placed
from interp.prompts import Prompt, Range

if TYPE_CHECKING:
    from torch import Tensor

    from interp.model import Model

BoxesLike = Mapping[str, Box | tuple[int, Box]]

TOWER = "vision"


def image_prompt(
    model: "Model",
    text: str | None,
    images: ImageLike | Sequence[ImageLike],
    *,
    boxes: BoxesLike | None = None,
    spans: Characters | None = None,
    answer: str | None = None,
    id: str = "",
) -> Prompt:
    """A prompt with images, prepared by the model's processor.

    Args:
        model: a model with its processor; of a vision transformer alone, an image processor.
        text: the text with a placeholder for every image; with one image the placeholder may be
            left out and then comes first. None for a vision transformer alone.
        images: an image or several; see `open_image`.
        boxes: name to box, in pixels of its image: left, top, right, bottom; or image and box.
            Each becomes a span of the tokens that touch it, in the text and in the tower.
        spans: name to ranges of characters of the text, each a span of the tokens they touch.
        answer: what the model should produce next, tokenised as it stands.
        id: name of the example.

    Returns:
        A prompt with spans `image`, `image-0`, …, `image-0/tile-0`, …, its patch map, and the
        view of its vision tower.

    Raises:
        InputError: images, placeholders and boxes do not fit one another, or the model reads none.
        UnsupportedModelError: which pixels this model's tokens stand for is not known.
    """
    if isinstance(images, str | Path | bytes | bytearray) or not isinstance(images, Sequence):
        images = [images]
    _reads_images(model, len(images))
    family = family_of(model.config)
    processor = _processor(model, family)
    opened = [open_image(image) for image in images]
    if not opened:
        raise InputError("a prompt with images needs at least one; got none")
    sizes = tuple((image.width, image.height) for image in opened)
    check_boxes(boxes, sizes)
    if not model.reads_tokens:
        if text:
            raise InputError(f"{model.name} reads images alone; got the text {text[:40]!r}")
        tensors = processed(model, processor, {"images": opened})
        return _made(model, family, None, tensors, sizes, boxes, None, id)
    if not text:
        raise InputError("a text must not be empty; got none")
    text, by = _with_placeholders(model, processor, family, text, len(opened))
    wanted = {name: [(a + by, b + by) for a, b in found] for name, found in (spans or {}).items()}
    options: dict[str, Any] = {"text": [text], "images": opened}
    if wanted:
        options |= {"return_offsets_mapping": True, "return_text_replacement_offsets": True}
    tensors = processed(model, processor, options)
    offsets = tensors.pop("offset_mapping", None)
    replaced: Any = tensors.pop("text_replacement_offsets", None)
    made = _made(
        model, family, token_ids(tensors), tensors, sizes, boxes, _answer(model, answer), id
    )
    if not wanted:
        return made
    if offsets is None or replaced is None:
        raise InputError(f"the processor of {model.name} must say where its tokens stand")
    moved = placed(wanted, replaced[0], text, _placeholder(processor))
    more = covered(moved, offsets[0].tolist(), made.tokens, _tokenizer(model), text, wanted)
    return _with_spans(made, more)


def prompt_from_tensors(
    model: "Model",
    inputs: "Mapping[str, Tensor]",
    *,
    sizes: Sequence[Size] | None = None,
    boxes: BoxesLike | None = None,
    answer: Sequence[int] | None = None,
    id: str = "",
) -> Prompt:
    """A prompt from ready tensors of one example, as a processor returns them.

    Args:
        model: the model they are for. Its processor is used for its settings, where it has one.
        inputs: `input_ids` [1, pos], `pixel_values` and what else the model takes.
        sizes: width and height of each image as it was, then of each video. Without them boxes
            are in pixels of the images as the tensors hold them.
        boxes: as for `image_prompt`.
        answer: token ids of the answer.
        id: name of the example.

    Raises:
        InputError: more than one example, or tensors, sizes and boxes do not fit one another.
        UnsupportedModelError: which pixels this model's tokens stand for is not known.
    """
    _reads_images(model, 1)
    family = family_of(model.config)
    tokens = token_ids(inputs) if model.reads_tokens else None
    known = None if sizes is None else tuple((int(w), int(h)) for w, h in sizes)
    return _made(
        model, family, tokens, inputs, known, boxes, None if answer is None else tuple(answer), id
    )


def _processor(model: "Model", family: Family) -> Any:
    """What prepares text and images: the model's processor, or its parts where these suffice."""
    if model.processor is None:
        raise InputError(
            f"images need a processor and {model.name} has none",
            hint="pass processor=... to interp.load (an image processor may do), or use "
            "prompt_from_tensors",
        )
    if not model.reads_tokens or getattr(model.processor, "tokenizer", None) is not None:
        return model.processor
    if model.tokenizer is None:
        raise InputError(
            f"text needs a tokenizer and {model.name} has none",
            hint="pass tokenizer=... to interp.load",
        )
    tower = getattr(model.config, "vision_config", None)
    if not family.runs or getattr(tower, "model_type", "") == "pixtral":
        raise InputError(
            f"text and images need the whole processor of {model.name}; got its "
            f"{type(model.processor).__name__} alone",
            hint="pass processor=... to interp.load, or use prompt_from_tensors",
        )
    return RunProcessor(model.processor, model.tokenizer, model.config, family)


def _reads_images(model: "Model", count: int) -> None:
    if "pixel_values" not in inspect.signature(model.hf.forward).parameters:
        kind = getattr(model.config, "model_type", type(model.hf).__name__)
        raise InputError(f"{model.name} ({kind}) reads no images; got {count}")


def _made(
    model: "Model",
    family: Family,
    tokens: tuple[int, ...] | None,
    tensors: "Mapping[str, Tensor]",
    sizes: tuple[Size, ...] | None,
    boxes: BoxesLike | None,
    answer: tuple[int, ...] | None,
    id: str,
) -> Prompt:
    inputs = model_inputs(model, tensors)
    settings = None if model.processor is None else Settings.of(model.processor)
    found = family.read(Example(model.config, inputs, sizes, settings))
    named = check_boxes(boxes, found.sizes)
    views = _views(found, named, id)
    if tokens is None:
        prompt = _of_tower(views, inputs, id)
    else:
        prompt = _of_text(model, tokens, found, named, views, inputs, answer, id)
    check_seen(named, prompt)
    return prompt


Views = dict[str, tuple[Prompt, ...]]


def _views(found: Layout, boxes: Boxes, called: str) -> Views:
    """An example as each tower sees it, and as layers do that see it otherwise."""
    rows = ({TOWER: found.rows} if found.rows else {}) | dict(found.others)
    made: dict[tuple[int, int], tuple[Prompt, ...]] = {}
    out: Views = {}
    for name, cells in rows.items():
        windows = found.windows.get(name)
        key = id(cells), id(windows)  # layers of one stage share their views
        if key not in made:
            made[key] = tower_views(cells, found.sizes, boxes, id=called, windows=windows)
        out[name] = made[key]
    return out


def _of_tower(views: Views, inputs: "Mapping[str, Tensor]", id: str) -> Prompt:
    if len(views[TOWER]) != 1:
        raise InputError(
            f"a vision transformer alone reads one image a prompt; got {len(views[TOWER])}",
            hint="make a prompt of each",
        )
    seen = views[TOWER][0]
    return Prompt(seen.tokens, seen.spans, id, inputs=inputs, patches=seen.patches, views=views)


def _of_text(
    model: "Model",
    tokens: tuple[int, ...],
    found: Layout,
    boxes: Boxes,
    views: Views,
    inputs: "Mapping[str, Tensor]",
    answer: tuple[int, ...] | None,
    id: str,
) -> Prompt:
    spans: dict[str, tuple[Range, ...]] = {}
    if tokens[0] == model.bos_id:
        spans["bos"] = ((0, 1),)
    patches: PatchMap | None = None
    if found.text:
        at: dict[int, Cell] = {}
        for token, cells in found.text:
            places = [i for i, t in enumerate(tokens) if t == token]
            if len(places) != len(cells):
                raise InputError(
                    f"the images make {len(cells)} tokens of {model.name}; the prompt has "
                    f"{len(places)} placeholders (token {token})",
                    hint="the tensors, or the settings of the processor, are those of another model"
                    " or image",
                )
            at |= dict(zip(places, cells, strict=True))
        places = sorted(at)
        more, patches = described(
            [at[i] for i in places], places, len(tokens), found.sizes, tower=False
        )
        spans |= more | boxed(patches, boxes)
    return Prompt(tokens, spans, id, answer, inputs=inputs, patches=patches, views=views)


def _tokenizer(model: "Model") -> Any:
    inner = getattr(model.processor, "tokenizer", None)
    return model.tokenizer if inner is None else inner


def _answer(model: "Model", answer: str | None) -> tuple[int, ...] | None:
    if answer is None:
        return None
    ids = tuple(_tokenizer(model)(answer, add_special_tokens=False).input_ids)
    if not ids:
        raise InputError("an answer must hold at least one token; got none")
    return ids


def _placeholder(processor: Any) -> str:
    """What stands for an image in a text, or nothing where text and images stay apart."""
    return str(getattr(processor, "image_token", None) or "")


def _with_placeholders(
    model: "Model", processor: Any, family: Family, text: str, count: int
) -> tuple[str, int]:
    """The text with a placeholder for each image, and how many characters came before it."""
    mark = _placeholder(processor)
    if not mark:
        if _shares_a_sequence(model):
            raise UnsupportedModelError(
                f"the processor of {model.name} names no placeholder for images",
                hint="use prompt_from_tensors",
            )
        return text, 0
    there = text.count(mark)
    if there == 0 and count == 1:
        vocabulary = _tokenizer(model).get_vocab()
        before, after = family.around
        # Marks that this tokenizer lacks would be read as words.
        before, after = (x if x in vocabulary or x.isspace() else "" for x in (before, after))
        added = f"{before}{mark}{after}"
        return added + text, len(added)
    if there != count:
        raise InputError(
            f"a text must have a placeholder {mark} for each image; got {there} for {count} images",
            hint=f"write {mark} where each image belongs",
        )
    return text, 0


def _shares_a_sequence(model: "Model") -> bool:
    return any(
        getattr(model.config, name, None) is not None
        for name in ("image_token_id", "image_token_index")
    )


def _with_spans(prompt: Prompt, more: Mapping[str, tuple[Range, ...]]) -> Prompt:
    from dataclasses import replace

    twice = next((name for name in more if name in prompt.spans), None)
    if twice is not None:
        raise InputError(f"a span cannot be called {twice!r}: the prompt has one of that name")
    return replace(prompt, spans={**prompt.spans, **more})
