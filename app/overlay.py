"""What a run keeps of its images: where heads look, readable without torch or the model.

A run of prompts with images has an extra `sight`, a table of arrays with a JSON header:

    N/image-M   the bytes of a PNG file of image M of prompt N, at most 1024 pixels a side
    N/places    [token, 7] row of the tower, position, image, grid row, grid column, tile (-1 is
                none) and frame of each token that stands for pixels
    N/boxes     [token, 4] left, top, right, bottom of its patch, in pixels of the image as it was
    N/rows      [head, token] mass of each head on these tokens, 0..1
    header      heads, best heads of each table, and of each prompt its id, text, sizes of its
                images, named boxes, and which query looks
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.errors import RunError, UnknownNameError

if TYPE_CHECKING:
    from PIL.Image import Image

    from interp.run import Run

EXTRA, SCHEMA, VERSION = "sight", "headscope.sight", 1
COLUMNS = ("prompt", "head", "mass", "in_box", "patch_mass", "left", "top", "right", "bottom")


@dataclass(frozen=True)
class Sight:
    """What a run kept of one prompt with images.

    Attributes:
        id: of the prompt.
        text: of the prompt; may be empty.
        query: which query looks, in words.
        images: the images, made smaller where they were large.
        sizes: width and height of each as it was.
        named: name to image and box, in pixels of the image as it was.
        boxes: [token, 4] patch of each token, likewise.
        image: [token] which image.
        rows: head to [token] mass, 0..1.
    """

    id: str
    text: str
    query: str
    images: "Sequence[Image]"
    sizes: Sequence[tuple[int, int]]
    named: Mapping[str, tuple[int, tuple[float, ...]]]
    boxes: np.ndarray
    image: np.ndarray
    rows: Mapping[str, np.ndarray]

    def inside(self) -> np.ndarray:
        """[token] whether its patch touches a named box."""
        out = np.zeros(len(self.boxes), dtype=bool)
        for image, (left, top, right, bottom) in self.named.values():
            b = self.boxes
            out |= (self.image == image) & (b[:, 0] < right) & (b[:, 2] > left) & (
                b[:, 1] < bottom) & (b[:, 3] > top)  # fmt: skip
        return out

    def row(self, head: str) -> dict[str, Any]:
        """What the table of an overlay says of a head."""
        mass = np.nan_to_num(self.rows[head])
        total, best = float(mass.sum()), int(mass.argmax())
        share = float(mass[self.inside()].sum()) / total if self.named and total > 0 else None
        left, top, right, bottom = (float(x) for x in self.boxes[best])
        return {
            "prompt": self.id, "head": head, "mass": total, "in_box": share,
            "patch_mass": float(mass[best]), "left": left, "top": top, "right": right,
            "bottom": bottom,
        }  # fmt: skip


def sight_of(
    run: "Run",
    *,
    prompt: str | None = None,
    heads: Sequence[str] = (),
    detector: str | None = None,
    top: int | None = None,
) -> Sight:
    """What a run kept of one of its prompts.

    Args:
        run: the run.
        prompt: its id; the first that was kept if None.
        heads: only these heads, in this order.
        detector: the heads of this table only; those of the first if None and no heads are named.
        top: at most so many heads; all if None.

    Raises:
        RunError: the run has no images, or what it kept is damaged.
        UnknownNameError: no such prompt, head or table was kept.
    """
    part = run.extra(EXTRA)
    if part is None:
        raise RunError(
            f"an overlay needs a run of prompts with images; {run.folder} has none",
            hint="headscope rank --image PATH --prompt TEXT makes one; the run of an older version "
            "gets them by its own command",
        )
    try:
        if part.meta["schema"] != SCHEMA or int(part.meta["version"]) > VERSION:
            raise RunError(
                f"the overlay of {run.folder} must be of version {VERSION}; it is "
                f"{part.meta['schema']} {part.meta['version']}",
                hint="update headscope",
            )
        about = {str(p["id"]): (i, p) for i, p in enumerate(part.meta["prompts"])}
        name = next(iter(about)) if prompt is None else prompt
        if name not in about:
            raise UnknownNameError("prompt with an overlay", name, about)
        i, facts = about[name]
        places = part.arrays[f"{i}/places"]
        known = [str(h) for h in part.meta["heads"]]
        kept = dict(zip(known, part.arrays[f"{i}/rows"], strict=True))
        return Sight(
            name, str(facts["text"]), str(facts["query"]),
            [_opened(part.arrays[f"{i}/image-{j}"]) for j in range(len(facts["sizes"]))],
            [(int(w), int(h)) for w, h in facts["sizes"]],
            {str(n): (int(b[0]), tuple(float(x) for x in b[1:]))
             for n, b in facts["boxes"].items()},
            part.arrays[f"{i}/boxes"], places[:, 2],
            {h: kept[h] for h in _chosen(part.meta, known, heads, detector)[:top]},
        )  # fmt: skip
    except (KeyError, ValueError, TypeError, IndexError, StopIteration, OSError) as error:
        raise RunError(
            f"the overlay of {run.folder} is damaged: {type(error).__name__} {error}",
            hint=f"delete {run.folder}/extra and run the command again",
        ) from None


def _opened(data: np.ndarray) -> "Image":
    from PIL import Image

    with Image.open(io.BytesIO(data.tobytes()), formats=["PNG"]) as image:
        return image.convert("RGB")


def _chosen(
    meta: Mapping[str, Any], known: Sequence[str], heads: Sequence[str], detector: str | None
) -> Sequence[str]:
    from interp.headid import HeadId

    if heads:
        names = [str(HeadId.parse(h)) for h in heads]
        if len({h.tower for h in map(HeadId.parse, known)}) == 1 and not set(names) <= set(known):
            # Of a vision transformer alone "L3H4" can only mean its one tower.
            prefix = known[0].rpartition(".")[0]
            names = [n if n in known or not prefix else f"{prefix}.{n}" for n in names]
        for name in names:
            if name not in known:
                raise UnknownNameError("head with an overlay", name, known)
        return list(dict.fromkeys(names))
    best = meta["best"]
    if detector is not None and detector not in best:
        raise UnknownNameError("table of scores with an overlay", detector, best)
    found = best[detector] if detector is not None else next(iter(best.values()), [])
    return [str(h) for h in found] or list(known)
