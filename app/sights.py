"""Where heads look on images, kept in a run so that an overlay can be drawn without the model.

For the first prompts with images and the best heads: the images, the patch of each token, and the
row of each head over these tokens.

    query   the last token of the prompt, from which the answer begins; in a vision tower its class
            token; in towers without one, the mean over all queries

What is kept is one file of the run, an *extra*; see `app.overlay` for its form and its reader.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from app.exits import say
from app.overlay import EXTRA, SCHEMA, VERSION
from interp.errors import InterpError
from interp.headid import DEFAULT_TOWER
from interp.images.lines import reads_images

if TYPE_CHECKING:
    from PIL.Image import Image

    from interp.headid import HeadId
    from interp.images.patches import Box, Patch, PatchMap
    from interp.model import Model
    from interp.promptfile import Line
    from interp.prompts import Prompt
    from interp.recipe import Recipe
    from interp.run import Run
    from interp.scores import HeadScores
    from interp.seam.structure import Tower

PROMPTS, HEADS, SIDE = 4, 8, 1024
"""Prompts and heads that are kept, and pixels of the longer side of an image."""

BOXES = ("thing",)
"""The box that tasks name what is asked about."""


@dataclass(frozen=True)
class Sights:
    """What a run keeps of the images of its prompts.

    Attributes:
        model: the model.
        prompts: makes the prompts of the run, in order.
        lines: their lines where they are own prompts, which name the files of the images.
        tower: tower whose heads look; the model's first if None.
        boxes: names of the boxes that matter; all boxes if none of these is there.
        heads: heads beside those of the tables.
        most: prompts that are kept.
        best: heads of each table that are kept.
    """

    model: "Model"
    prompts: "Callable[[], Sequence[Prompt]]"
    lines: "Sequence[Line] | None" = None
    tower: str | None = None
    boxes: Sequence[str] = ()
    heads: "Sequence[HeadId]" = ()
    most: int = PROMPTS
    best: int = HEADS

    def keep(self, run: "Run", tables: "Mapping[str, HeadScores]") -> None:
        """Keep them in a complete run that has none yet; says why if they cannot be made.

        The numbers of the run are on the disk already: nothing that fails here takes them away.
        """
        from interp.memory import fitting

        if not reads_images(self.model) or run.extra(EXTRA) is not None:
            return
        try:
            with fitting("the rows of an overlay", "choose smaller images"):
                made = self._made(tables)
            if made is not None:
                run.put_extra(EXTRA, *made)
        except InterpError as error:
            say(f"no overlay is kept: {error}", label="note", hint=error.hint)

    def _made(
        self, tables: "Mapping[str, HeadScores]"
    ) -> "tuple[dict[str, np.ndarray], dict[str, Any]] | None":
        prompts = list(self.prompts())
        chosen = [i for i, p in enumerate(prompts) if p.inputs][: self.most]
        if not chosen:
            return None
        tower = self.model.tower(self.tower or next(iter(self.model.towers)))
        best = {name: self._best(table, tower) for name, table in tables.items()}
        heads = list(dict.fromkeys([*self.heads, *(h for some in best.values() for h in some)]))
        arrays: dict[str, np.ndarray] = {}
        about: list[dict[str, Any]] = []
        for i in chosen:
            found = looks(self.model, tower, prompts[i])
            if found is None:
                continue
            at = len(about)
            places, boxes, rows, query = found
            if not heads:
                heads = _by_mass(rows, tower, self.best)
            arrays[f"{at}/places"], arrays[f"{at}/boxes"] = places, boxes
            arrays[f"{at}/rows"] = np.stack([rows[_at(h, tower)] for h in heads])
            images, sizes = images_of(self.model, prompts[i], self._line(i))
            for j, image in enumerate(images):
                arrays[f"{at}/image-{j}"] = png(image)
            named = boxes_of(prompts[i], self._line(i))
            wanted = {n: b for n, b in named.items() if n in self.boxes} or named
            about.append(
                {"id": prompts[i].id or f"prompt-{i}", "sizes": sizes, "query": query,
                 "boxes": {n: [image, *box] for n, (image, box) in wanted.items()},
                 "text": self._text(i, prompts[i])}
            )  # fmt: skip
        if not about:
            return None
        meta = {
            "schema": SCHEMA, "version": VERSION, "model": self.model.name, "tower": tower.name,
            "heads": [str(h) for h in heads], "prompts": about,
            "best": {name: [str(h) for h in some] for name, some in best.items()},
        }  # fmt: skip
        return arrays, meta

    def _best(self, table: "HeadScores", tower: "Tower") -> "list[HeadId]":
        if table.granularity != "query":  # a key-value group is no head that looks
            return []
        mine = set(tower.heads)
        found = [h for h in table.top(len(table.heads)) if h in mine]
        return found[: self.best]

    def _line(self, i: int) -> "Line | None":
        return None if self.lines is None else self.lines[i]

    def _text(self, i: int, prompt: "Prompt") -> str:
        line = self._line(i)
        return str((line.text if line is not None else prompt.meta.get("question")) or "")


def images_of(
    model: "Model", prompt: "Prompt", line: "Line | None"
) -> "tuple[list[Image], list[list[int]]]":
    """The images of a prompt, and their sizes as they were."""
    from interp.images import open_image

    if line is not None:
        opened = [open_image(path) for path in line.images]
        return opened, [[x.width, x.height] for x in opened]
    maps = _maps(prompt)
    seen = [
        _shown(model, prompt, j, size, [p.box for p in maps[0] if p.image == j])
        for j, size in enumerate(maps[0].sizes)
    ]
    return seen, [list(size) for size in maps[0].sizes]


def boxes_of(prompt: "Prompt", line: "Line | None") -> "dict[str, tuple[int, Sequence[float]]]":
    """Named boxes of a prompt: image and box, in pixels of the image as it was."""
    if line is not None:
        return dict(line.boxes)
    given = prompt.meta.get("boxes") or {}
    return {
        str(name): (int(box[0]), box[1]) if len(box) == 2 else (0, box)
        for name, box in given.items()
    }


def pictures_of(
    model: "Model", prompt: "Prompt", line: "Line | None" = None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What a trace keeps of the images of a prompt; nothing if it has none.

    Returns:
        `image-J`, the bytes of a PNG file of each image; of each tower that sees pixels
        `TOWER/places` [position, 7] (row of the tower, position in it, image, grid row, grid
        column, tile and frame, -1 where there is none) and `TOWER/boxes` [position, 4] in pixels
        of the image as it was, NaN where a position stands for none; and sizes and named boxes.
    """
    if not prompt.inputs or not _maps(prompt):
        return {}, {}
    images, sizes = images_of(model, prompt, line)
    arrays = {f"image-{j}": png(image) for j, image in enumerate(images)}
    rows: dict[str, Sequence[Prompt]] = {}
    if prompt.patches is not None and model.reads_tokens:
        rows[DEFAULT_TOWER] = (prompt,)
    # A view of one layer alone is not that of the tower.
    rows |= {name: seen for name, seen in prompt.views.items() if "/" not in name}
    for name, seen in rows.items():
        arrays[f"{name}/places"], arrays[f"{name}/boxes"] = _every_place(seen)
    named = {n: [image, *map(float, box)] for n, (image, box) in boxes_of(prompt, line).items()}
    return arrays, {"sizes": sizes, "boxes": named}


def _every_place(rows: "Sequence[Prompt]") -> tuple[np.ndarray, np.ndarray]:
    n = sum(map(len, rows))
    places, boxes = np.full((n, 7), -1, np.int32), np.full((n, 4), np.nan, np.float32)
    first = 0
    for b, row in enumerate(rows):
        own = slice(first, first + len(row))
        places[own, 0], places[own, 1] = b, np.arange(len(row))
        for patch in row.patches or ():
            places[first + patch.position] = _place(b, patch)
            boxes[first + patch.position] = patch.box
        first += len(row)
    return places, boxes


def _place(row: int, patch: "Patch") -> tuple[int, ...]:
    tile = -1 if patch.tile is None else patch.tile
    return row, patch.position, patch.image, patch.row, patch.column, tile, patch.frame


def heads_of(recipe: "Recipe", model: "Model") -> "tuple[HeadId, ...]":
    """The heads that a recipe names in the first tower, at most as many as are kept."""
    known = set(next(iter(model.towers.values())).heads)
    named = [h for edit in recipe.edits for h in edit.where.heads or () if h in known]
    return tuple(dict.fromkeys(named))[:HEADS]


def looks(
    model: "Model", tower: "Tower", prompt: "Prompt"
) -> "tuple[np.ndarray, np.ndarray, np.ndarray, str] | None":
    """Where every head of a tower looks on the images of a prompt.

    Args:
        model: the model.
        tower: its tower.
        prompt: the prompt.

    Returns:
        Places [token, 7] (row of the tower, position, image, grid row, grid column, tile or -1,
        frame) and boxes [token, 4] in pixels of the image, of each token that stands for pixels;
        mass [layer, head, token] in 0..1, NaN where there is no such head; and the query in words.
        None if no token of the tower stands for pixels.
    """
    import torch

    from heads.sight import LAST, with_last
    from interp.engine import read
    from interp.readings import KeyMass, Rows

    batch = model.batch([with_last(prompt)])
    shown = batch.view(tower.name)
    seen = batch if shown is None else shown[0]
    rows = seen.prompts
    if not any(r.patches is not None and len(r.patches) for r in rows):
        return None
    last = all(LAST in r.spans for r in rows)
    query = "last token" if shown is None else "class token" if last else "mean of all tokens"
    with torch.no_grad():
        found = read(model, batch, {"row": Rows(LAST) if last else KeyMass()}, tower=tower.name)
    values = found["row"].values
    values = values[..., 0, :] if last else values
    places, boxes, masses = [], [], []
    for b, (row, skipped) in enumerate(zip(rows, seen.offsets, strict=True)):
        for p in row.patches or ():
            places.append(_place(b, p))
            boxes.append(p.box)
            masses.append(values[b, :, :, skipped + p.position].float().cpu().numpy())
    return (
        np.array(places, dtype=np.int32), np.array(boxes, dtype=np.float32),
        np.stack(masses, axis=-1).astype(np.float32), query,
    )  # fmt: skip


def _at(head: "HeadId", tower: "Tower") -> tuple[int, int]:
    layers = [layer.index for layer in tower.layers]
    return layers.index(head.layer), head.head


def _by_mass(rows: np.ndarray, tower: "Tower", most: int) -> "list[HeadId]":
    """The heads that look at the images most."""
    mass = {h: float(np.nan_to_num(rows[_at(h, tower)].sum())) for h in tower.heads}
    return sorted(mass, key=lambda h: -mass[h])[:most]


def _maps(prompt: "Prompt") -> "list[PatchMap]":
    """The patches of a prompt, and of each row of its towers."""
    maps = [prompt.patches, *(row.patches for rows in prompt.views.values() for row in rows)]
    return [m for m in maps if m is not None]


def _shown(
    model: "Model", prompt: "Prompt", j: int, size: tuple[int, int], patches: "Sequence[Box]"
) -> "Image":
    """An image as the model was given it; grey where its tensor is no whole picture."""
    from PIL import Image

    pixels: Any = prompt.inputs.get("pixel_values")
    boxes = np.array(patches, dtype=np.float32).reshape(-1, 4)
    whole = len(boxes) > 0 and np.allclose(
        [*boxes[:, :2].min(0), *boxes[:, 2:].max(0)], [0, 0, *size], atol=1
    )
    fits = pixels is not None and pixels.dim() == 4 and pixels.shape[1] == 3
    if not whole or not fits or len(pixels) != len(_maps(prompt)[0].sizes):
        return Image.new("RGB", size, (128, 128, 128))
    x = pixels[j].float().permute(1, 2, 0).cpu().numpy()
    inner = getattr(model.processor, "image_processor", model.processor)
    mean, std = getattr(inner, "image_mean", None), getattr(inner, "image_std", None)
    if mean is not None and std is not None:
        x = x * np.array(std) + np.array(mean)
    else:
        x = (x - x.min()) / max(float(x.max() - x.min()), 1e-6)
    made = Image.fromarray((255 * x).round().clip(0, 255).astype(np.uint8))
    return made if made.size == size else made.resize(size)


def png(image: "Image") -> np.ndarray:
    """The bytes of a PNG file of an image, made smaller if it is large."""
    small = image.copy()
    small.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    small.save(out, "PNG")
    return np.frombuffer(out.getvalue(), dtype=np.uint8)
