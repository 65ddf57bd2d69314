"""How right a perfect observer of shapes scenes can be, given that faint colours are hard to see.

    python -m interp.zoo.train.shapes_ceiling

The observer knows how the world makes its scenes. It is told all shapes and places, the colours of
clear things, which things are faint, and the exact shade of each, without the noise of the pixels.
It then weighs every colouring of the faint things by Bayes and answers the likeliest. So it bounds
from above what anyone can expect who sees the pixels alone.

A faint shade is grey, plus a uniform share of the way to the colour, plus a Gaussian tint: the
likelihood of a colour is an integral over that share, which has a closed form. Colourings are few
and are enumerated. Only the scenes themselves are sampled.
"""

import argparse
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from interp.errors import InputError
from interp.scenes import COLOURS, GREY, HABIT, HABITS, SHAPES, TINT, WORLDS
from interp.scenes import _colours as draw_colours
from interp.scenes import _may as may_have

SHOWN = 0.3
"""The greatest share of the way from grey to its colour that a faint thing shows."""

Shade = Sequence[float]
Colours = tuple[str, ...]


@dataclass(frozen=True)
class Ceiling:
    """The expected accuracy of the perfect observer.

    Attributes:
        describe: probability that all colours of a scene are named right, 0..1.
        color: probability that the colour of a random thing is named right, 0..1.
        error: standard errors of the two, from sampling scenes.
    """

    describe: float
    color: float
    error: tuple[float, float]

    def words(self) -> str:
        """Such as `describe 0.927 (± 0.001), color 0.975 (± 0.001)`."""
        return (
            f"describe {self.describe:.3f} (± {self.error[0]:.3f}), "
            f"color {self.color:.3f} (± {self.error[1]:.3f})"
        )


def likelihood(shade: Shade, colour: str) -> float:
    """Density of a faint shade for a thing of a colour, up to a factor that all colours share.

    Args:
        shade: red, green and blue in levels of 0..255, without the noise of pixels.
        colour: one of `COLOURS`.
    """
    seen = np.asarray(shade, float) - GREY
    way = np.array(COLOURS[colour], float) - GREY
    length = float(np.linalg.norm(way))
    along = float(seen @ way) / length
    across = float(seen @ seen) - along**2
    inside = _below((SHOWN * length - along) / TINT) - _below(-along / TINT)
    return math.exp(-across / (2 * TINT**2)) * inside / length


def _below(x: float) -> float:
    """The standard normal distribution function."""
    return 0.5 * math.erfc(-x / math.sqrt(2))


@cache
def prior(shapes: tuple[str, ...], colours: Colours, world: str) -> float:
    """Probability that a world gives these shapes, in reading order, these colours.

    Which shapes of habit keep it is drawn first, and the others choose among what is left.
    """
    habitual = [s for s in shapes if s in HABITS] if world == "skewed" else []
    wanted = dict(zip(shapes, colours, strict=True))
    total = 0.0
    for kept in itertools.product((True, False), repeat=len(habitual)):
        taken = {s: HABITS[s] for s, keep in zip(habitual, kept, strict=True) if keep}
        if any(wanted[s] != colour for s, colour in taken.items()):
            continue
        chance = HABIT ** len(taken) * (1 - HABIT) ** (len(habitual) - len(taken))
        for shape in shapes:
            if shape in taken:
                continue
            left = [c for c in COLOURS if c not in taken.values() and may_have(world, shape, c)]
            chance *= (wanted[shape] in left) / len(left)
            taken[shape] = wanted[shape]
        total += chance
    return total


def posterior(
    shapes: Sequence[str], colours: Sequence[str], shades: Sequence[Shade | None], world: str
) -> dict[Colours, float]:
    """Probability of each colouring of a scene, given what the observer is told.

    Args:
        shapes: of the things, in reading order.
        colours: their colours; those of faint things are not looked at.
        shades: the shade of each faint thing, None for a clear one.
        world: one of `WORLDS`.

    Raises:
        InputError: an unknown world, or clear things that cannot look as they do there.
    """
    if world not in WORLDS:
        raise InputError(f"world must be one of {', '.join(WORLDS)}; got {world!r}")
    faint = [i for i, shade in enumerate(shades) if shade is not None]
    fits = [{c: likelihood(shade, c) for c in COLOURS} for shade in shades if shade is not None]
    known = [c for i, c in enumerate(colours) if i not in faint]
    found: dict[Colours, float] = {}
    for guess in itertools.permutations([c for c in COLOURS if c not in known], len(faint)):
        whole = list(colours)
        for i, colour in zip(faint, guess, strict=True):
            whole[i] = colour
        weight = prior(tuple(shapes), tuple(whole), world)
        weight *= math.prod(fit[c] for fit, c in zip(fits, guess, strict=True))
        if weight > 0:
            found[tuple(whole)] = weight
    total = sum(found.values())
    if not total:
        raise InputError(f"the {world} world has no such scene: {', '.join(known)}")
    return {whole: weight / total for whole, weight in found.items()}


def best(weights: dict[Colours, float]) -> tuple[float, float]:
    """Chances of the likeliest colouring, and of the likeliest colour of a random thing."""
    things = len(next(iter(weights)))
    single = 0.0
    for i in range(things):
        of = {c: sum(w for whole, w in weights.items() if whole[i] == c) for c in COLOURS}
        single += max(of.values()) / things
    return max(weights.values()), single


def ceiling(
    world: str, faint: float, *, n: int = 20_000, things: tuple[int, int] = (2, 4), seed: int = 0
) -> Ceiling:
    """What the perfect observer expects to get right in a world.

    Args:
        world: `skewed` or `even`.
        faint: share of things that are faint.
        n: scenes.
        things: least and greatest number of things.
        seed: of the scenes.

    Raises:
        InputError: another world.
    """
    if world not in ("skewed", "even"):
        raise InputError(
            f"world must be skewed or even; got {world!r}",
            hint="the conflict world chooses its shapes otherwise, and is asked about habits alone",
        )
    rng = random.Random(f"ceiling/{seed}")
    chances = np.empty((n, 2))
    for at in range(n):
        shapes = rng.sample(SHAPES, rng.randint(*things))
        colours = draw_colours(rng, shapes, world, ())
        shades = [faint_shade(rng, c) if rng.random() < faint else None for c in colours]
        # With every colour seen there is nothing to weigh.
        seen = all(shade is None for shade in shades)
        chances[at] = (1, 1) if seen else best(posterior(shapes, colours, shades, world))
    mean, error = chances.mean(0), chances.std(0) / math.sqrt(n)
    return Ceiling(float(mean[0]), float(mean[1]), (float(error[0]), float(error[1])))


def faint_shade(rng: random.Random, colour: str) -> list[float]:
    """The shade of a faint thing of a colour, drawn as `make_scene` does."""
    share = rng.uniform(0.0, SHOWN)
    return [GREY + share * (level - GREY) + rng.gauss(0, TINT) for level in COLOURS[colour]]


def main() -> None:
    """Print the expected accuracies by world and share of faint things."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--n", type=int, default=20_000)
    args = parser.parse_args()
    for world in ("skewed", "even"):
        for faint in (0.0, 0.1, 0.5, 1.0):
            found = ceiling(world, faint, n=args.n if faint <= 0.1 else args.n // 10)
            print(f"{world}, faint {faint:g}: {found.words()}", flush=True)


if __name__ == "__main__":
    main()
