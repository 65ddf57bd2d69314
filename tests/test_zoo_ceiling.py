"""The perfect observer of shapes scenes, against sums by hand and against rendered scenes."""

import itertools
import random

import numpy as np
import pytest

from interp.errors import InputError
from interp.scenes import CELL, COLOURS, GREY, HABITS, make_scene
from interp.zoo.train import shapes_ceiling as c

GREYISH = (128.0, 110.0, 131.0)


def test_likelihood_is_the_mean_over_how_much_colour_shows() -> None:
    shares = (np.arange(20_000) + 0.5) / 20_000 * 0.3
    want = {}
    for name, colour in COLOURS.items():
        middle = GREY + shares[:, None] * (np.array(colour) - GREY)
        want[name] = np.exp(-((np.array(GREYISH) - middle) ** 2).sum(1) / (2 * 22.0**2)).mean()
    ratio = {name: c.likelihood(GREYISH, name) / w for name, w in want.items()}
    assert list(ratio.values()) == pytest.approx([ratio["red"]] * 6, rel=1e-6)


@pytest.mark.parametrize(
    ("world", "shapes", "colours", "want"),
    [
        ("skewed", "square", "red", 0.92),
        ("skewed", "square", "white", 0.08 / 5),
        ("skewed", "ring", "white", 1 / 6),
        ("even", "square ring", "red green", 1 / 30),
        ("even", "square ring", "red red", 0),
        # The triangle leaves its habit and takes red, one of 4 if blue is taken, else one of 5.
        ("skewed", "triangle circle", "red blue", 0.08 * 0.92 / 4),
        ("skewed", "triangle circle", "red white", 0.08 / 5 * 0.08 / 4),
        # The square can be green only where the triangle is not kept to its habit.
        ("skewed", "square triangle", "green white", 0.08 / 5 * 0.08 / 5),
        ("conflict", "square ring", "red white", 0),
        ("conflict", "square ring", "green white", 1 / 25),
    ],
)
def test_prior_by_hand(world: str, shapes: str, colours: str, want: float) -> None:
    found = c.prior(tuple(shapes.split()), tuple(colours.split()), world)
    assert found == pytest.approx(want)


def test_prior_sums_to_one() -> None:
    shapes = ("circle", "ring", "square", "triangle")
    for world in ("skewed", "even", "conflict"):
        every = itertools.permutations(COLOURS, len(shapes))
        assert sum(c.prior(shapes, whole, world) for whole in every) == pytest.approx(1)


def test_posterior_by_hand() -> None:
    # A faint circle beside a clear red triangle: by the priors above blue has 0.0184, the others
    # 0.00032 each, red none.
    fit = {name: c.likelihood(GREYISH, name) for name in COLOURS}
    free = {name: 0.00032 * fit[name] for name in ("green", "yellow", "purple", "white")}
    free["blue"] = 0.0184 * fit["blue"]
    found = c.posterior(("triangle", "circle"), ("red", "?"), (None, GREYISH), "skewed")
    want = {("red", name): weight / sum(free.values()) for name, weight in free.items()}
    assert found == pytest.approx(want)


def test_shades_that_tell_nothing_leave_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c, "TINT", 1e6)
    two = c.ceiling("even", 1.0, things=(2, 2), n=50)
    assert (two.describe, two.color) == pytest.approx((1 / 30, 1 / 6), rel=1e-3)
    # Half of the shapes have a habit.
    one = c.ceiling("skewed", 1.0, things=(1, 1), n=4000)
    assert one.describe == pytest.approx((0.92 + 1 / 6) / 2, abs=4 * one.error[0])
    assert one.describe == pytest.approx(one.color)
    # With one of two things clear there are five colours left.
    some = c.ceiling("even", 0.5, things=(2, 2), n=4000)
    want = 1 / 4 + 1 / 2 / 5 + 1 / 4 / 30, 1 / 4 + 1 / 2 * (1 + 1 / 5) / 2 + 1 / 4 / 6
    assert some.describe == pytest.approx(want[0], abs=4 * some.error[0])
    assert some.color == pytest.approx(want[1], abs=4 * some.error[1])


def test_what_is_clear_is_right() -> None:
    assert c.ceiling("skewed", 0.0, n=50) == c.Ceiling(1.0, 1.0, (0.0, 0.0))


def shade_of(pixels: np.ndarray, thing) -> np.ndarray:
    """The mean of the middle pixels, which every shape but the ring covers."""
    y, x = thing.row * CELL + CELL // 2, thing.column * CELL + CELL // 2
    return pixels[y - 1 : y + 1, x - 1 : x + 1].mean((0, 1))


def test_observer_is_right_as_often_as_it_expects_on_rendered_scenes() -> None:
    n, right, sure = 1500, [], []
    for i in range(n):
        scene = make_scene(f"ceiling/{i}", things=(1, 2), faint=0.7)
        if any(t.shape == "ring" for t in scene.things):
            continue
        shapes, colours = zip(*((t.shape, t.colour) for t in scene.things), strict=True)
        shades = [shade_of(scene.pixels, t) if t.faint else None for t in scene.things]
        found = c.posterior(shapes, colours, shades, "skewed")
        likeliest = max(found, key=found.__getitem__)
        right.append(likeliest == colours)
        sure.append(found[likeliest])
    # How often it is right, above and below even odds: its trust is neither too great nor too low.
    for part in (np.array(sure) >= 0.6, np.array(sure) < 0.6):
        hits, trust = np.array(right)[part], np.array(sure)[part]
        assert len(hits) > 100
        error = np.sqrt((trust * (1 - trust)).sum()) / len(trust)
        assert hits.mean() == pytest.approx(trust.mean(), abs=3 * error)


def test_shades_drawn_are_those_of_rendered_scenes() -> None:
    rng = random.Random(0)
    seen, drawn = [], []
    for i in range(4000):
        scene = make_scene(f"shades/{i}", things=(1, 1), faint=1.0)
        (thing,) = scene.things
        way = np.array(COLOURS[thing.colour]) - GREY
        if thing.shape != "ring":  # how far along the way to the colour
            seen.append((shade_of(scene.pixels, thing) - GREY) @ way / (way @ way))
            drawn.append((np.array(c.faint_shade(rng, thing.colour)) - GREY) @ way / (way @ way))
    assert np.mean(seen) == pytest.approx(0.15, abs=4 * np.std(seen) / len(seen) ** 0.5)
    assert np.mean(drawn) == pytest.approx(np.mean(seen), abs=5 * np.std(seen) / len(seen) ** 0.5)
    assert np.std(drawn) == pytest.approx(np.std(seen), rel=0.1)


def test_wrong_worlds_are_refused() -> None:
    with pytest.raises(InputError, match="skewed or even"):
        c.ceiling("conflict", 0.1)
    with pytest.raises(InputError, match="must be one of"):
        c.posterior(("ring",), ("red",), (None,), "odd")
    with pytest.raises(InputError, match="no such scene"):
        c.posterior(("square",), (HABITS["square"],), (None,), "conflict")
