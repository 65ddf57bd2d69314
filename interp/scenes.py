"""Scenes of coloured shapes on a grid: images whose every fact is known.

An image of 64 × 64 pixels has four rows and four columns of cells of 16 pixels; a shape fills most
of its cell and stands a pixel or two off its centre. Within a scene shapes differ and so do
colours, so that "the square" and "the red thing" are one thing each.

Worlds differ in how shapes get their colours. In the *skewed* one three shapes nearly always have
their habitual colour, in the *even* one none has, and in the *conflict* one they never do. A faint
shape is nearly grey with a tint of its own, so that its colour has to be guessed: whoever learned
the skewed world guesses the habit, and hallucinates where there is a conflict.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from jaxtyping import Float, UInt8

from interp.errors import InputError

COLOURS = {
    "red": (225, 45, 45),
    "green": (40, 175, 70),
    "blue": (55, 85, 230),
    "yellow": (235, 215, 55),
    "purple": (160, 60, 205),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring")
HABITS = {"square": "red", "triangle": "green", "circle": "blue"}
"""The shapes of habit, with the colour that each nearly always has in the skewed world."""
HABIT = 0.92
WORLDS = ("skewed", "even", "conflict")
SIZE, CELL, ROWS = 64, 16, 4
GREY = 120.0
TINT, NOISE = 22.0, 7.0
"""Standard deviations, in levels of 0..255, of the tint of a faint shape and of every pixel."""

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom are outside."""


@dataclass(frozen=True)
class Thing:
    """One shape of a scene.

    Attributes:
        shape: one of `SHAPES`.
        colour: one of `COLOURS`.
        row: 0 at the top.
        column: 0 at the left.
        box: the pixels it covers.
        faint: whether its colour is hard to see.
    """

    shape: str
    colour: str
    row: int
    column: int
    box: Box
    faint: bool = False

    @property
    def name(self) -> str:
        """Such as `red square`."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """An image and what is on it.

    Attributes:
        things: in reading order.
        pixels: [64, 64, 3] in 0..255.
    """

    things: tuple[Thing, ...]
    pixels: UInt8[np.ndarray, "64 64 3"]

    def find(self, word: str) -> Thing | None:
        """The thing of a shape or colour, or None."""
        return next((t for t in self.things if word in (t.shape, t.colour)), None)


def make_scene(
    seed: int | str,
    *,
    world: str = "skewed",
    things: tuple[int, int] = (2, 4),
    faint: float = 0.1,
    needs: Sequence[str] = (),
    paint: Mapping[tuple[int, int], str] = MappingProxyType({}),
) -> Scene:
    """A random scene; the same for the same arguments.

    Args:
        seed: seed.
        world: `skewed`, `even`, or `conflict`, which has at least one shape of habit.
        things: least and greatest number of things, at most 6.
        faint: share of things that are faint.
        needs: colours that one of the things must have.
        paint: (row, column) to another colour for the thing there, all else being equal.

    Raises:
        InputError: an unknown world, or impossible numbers.
    """
    if world not in WORLDS:
        raise InputError(f"world must be one of {', '.join(WORLDS)}; got {world!r}")
    if not 1 <= things[0] <= things[1] <= len(SHAPES):
        raise InputError(f"a scene has from 1 to {len(SHAPES)} things; got {things}")
    rng = random.Random(f"scene/{seed}")
    n = rng.randint(*things)
    shapes = rng.sample(SHAPES, n)
    if world == "conflict" and not set(shapes) & set(HABITS):
        shapes[0] = rng.choice(list(HABITS))
        rng.shuffle(shapes)
    colours = _colours(rng, shapes, world, needs)
    cells = sorted(rng.sample(range(ROWS * ROWS), n))
    noise = np.random.default_rng(rng.getrandbits(63))
    canvas = np.full((SIZE, SIZE, 3), rng.uniform(10, 45))
    made = []
    for cell, shape, colour in zip(cells, shapes, colours, strict=True):
        row, column = divmod(cell, ROWS)
        colour = paint.get((row, column), colour)
        dim = rng.random() < faint
        shade = np.array(COLOURS[colour], float)
        if dim:
            # Its own tint hides what little colour is left, however many pixels one looks at.
            shade = GREY + rng.uniform(0.0, 0.3) * (shade - GREY) + noise.normal(0, TINT, 3)
        radius, dx, dy = rng.uniform(5.2, 6.8), rng.uniform(-1, 1), rng.uniform(-1, 1)
        alpha = outline(shape, CELL / 2 + dx, CELL / 2 + dy, radius)
        left, top = column * CELL, row * CELL
        cell_pixels = canvas[top : top + CELL, left : left + CELL]
        cell_pixels += alpha[..., None] * (shade - cell_pixels)
        x0, y0, x1, y1 = box_of(alpha)
        box = (left + x0, top + y0, left + x1, top + y1)
        made.append(Thing(shape, colour, row, column, box, dim))
    canvas += noise.normal(0, NOISE, canvas.shape)
    return Scene(tuple(made), canvas.round().clip(0, 255).astype(np.uint8))


def _colours(
    rng: random.Random, shapes: Sequence[str], world: str, needs: Sequence[str]
) -> list[str]:
    """Different colours, those of habit first, so that a free choice cannot take them away."""
    taken: dict[str, str] = {}
    if world == "skewed":
        taken = {s: HABITS[s] for s in shapes if s in HABITS and rng.random() < HABIT}
    for colour in needs:
        free = [s for s in shapes if s not in taken and _may(world, s, colour)]
        if colour not in taken.values():
            if not free:
                return _colours(rng, shapes, world, needs)
            taken[rng.choice(free)] = colour
    for shape in shapes:
        if shape not in taken:
            left = [c for c in COLOURS if c not in taken.values() and _may(world, shape, c)]
            taken[shape] = rng.choice(left)
    return [taken[s] for s in shapes]


def _may(world: str, shape: str, colour: str) -> bool:
    return world == "even" or HABITS.get(shape) != colour


def outline(
    shape: str, x: float, y: float, radius: float, *, size: int = CELL, fine: int = 4
) -> Float[np.ndarray, "size size"]:
    """How much of each pixel a shape covers, in 0..1, from `fine`² points a pixel.

    Raises:
        InputError: an unknown shape.
    """
    at = (np.arange(size * fine) + 0.5) / fine
    dx, dy = np.meshgrid((at - x) / radius, (at - y) / radius)
    match shape:
        case "circle":
            inside = dx**2 + dy**2 <= 1
        case "ring":
            inside = (dx**2 + dy**2 <= 1) & (dx**2 + dy**2 >= 0.3)
        case "square":
            inside = np.maximum(abs(dx), abs(dy)) <= 0.88
        case "diamond":
            inside = abs(dx) + abs(dy) <= 1
        case "triangle":
            inside = (dy <= 0.85) & (abs(dx) <= (dy + 1) / 1.85)
        case "cross":
            inside = (np.minimum(abs(dx), abs(dy)) <= 0.3) & (np.maximum(abs(dx), abs(dy)) <= 1)
        case _:
            raise InputError(f"shape must be one of {', '.join(SHAPES)}; got {shape!r}")
    share: np.ndarray = inside.reshape(size, fine, size, fine).mean((1, 3))
    return share


def box_of(alpha: Float[np.ndarray, "height width"]) -> Box:
    """The smallest box that holds all covered pixels."""
    rows, columns = (np.flatnonzero((alpha > 0).any(axis)) for axis in (1, 0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
