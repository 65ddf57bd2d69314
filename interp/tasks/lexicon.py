"""Words and sentences of the needle task: natural text whose every word is known beforehand.

Haystack words, keys and values are disjoint, so that a needle is told from its surroundings by
content. A word-level tokenizer over `vocabulary()` covers every text made here; a byte-pair
tokenizer of a real model reads it as ordinary English.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


KEYS: tuple[str, ...] = _words(
    """
    Amber Birch Cedar Delta Ember Falcon Garnet Harbor Indigo Jasper Kestrel Lotus Maple
    Nectar Onyx Pearl Quartz Raven Saffron Topaz Umber Violet Willow Xenon Yarrow Zephyr
    Acorn Badger Comet Dune Eagle Fern Glacier Heron Iris Juniper Koala Lynx Marble Nova
    Orchid Panther Quail River Sparrow Tulip Urchin Vulture Walnut Zebra
    """
)
VALUES: tuple[str, ...] = _words(
    """
    anchor basket candle dragon engine feather guitar hammer island jacket kettle ladder
    mirror needle orange pepper quilt ribbon saddle teapot umbrella violin wagon yogurt
    zipper apron button carpet dagger easel funnel goblet hinge inkwell jigsaw kernel
    lantern magnet napkin opal pillow quiver rocket spoon timber urn vase whistle yarn badge
    crayon drum envelope flute glove helmet ivory jewel kite lemon
    """
)
_ADJECTIVES = _words(
    """
    old young quiet busy tall small gentle weary cheerful careful patient proud happy
    curious honest famous lonely clever sleepy brave
    """
)
_PEOPLE = _words(
    """
    baker sailor farmer teacher doctor painter miller tailor singer writer hunter keeper
    driver soldier student grocer weaver potter fisher gardener
    """
)
_VERBS = _words(
    """
    walked ran drove travelled hurried wandered returned rode moved climbed
    """
)
_PLACES = _words(
    """
    market forest village castle bridge valley school church garden meadow station library
    theatre kitchen tavern stable tower beach mountain city
    """
)
_TIMES = _words(
    """
    morning evening winter summer autumn spring afternoon night
    """
)
_GLUE = _words(
    """
    The the to in and of is what What Note Recall code secret a
    """
)
_STOPS = (".", ":", "?", ",")


@dataclass(frozen=True)
class Wording:
    """How a fact is stated and asked for.

    Attributes:
        fact: sentence with the places {key} and {value}.
        question: text with the place {key}, after which the value is the answer.
        note: what a head must match to answer.
    """

    fact: str
    question: str
    note: str


WORDINGS: dict[str, Wording] = {
    "direct": Wording(
        "Note: {key} {value}.",
        "Recall: {key}",
        "the value follows its key: one token to match",
    ),
    "sentence": Wording(
        "The code of {key} is {value}.",
        "What is the code of {key}? The code of {key} is",
        "'is' stands between: two tokens to match",
    ),
}


def haystack_sentence(rng: random.Random) -> str:
    """One sentence of filler: 10 or 11 words and a stop."""
    who, where = rng.choice(_PEOPLE), rng.choice(_PLACES)
    first, second = rng.choice(_ADJECTIVES), rng.choice(_ADJECTIVES)
    when = rng.choice(_TIMES)
    verb = rng.choice(_VERBS)
    forms = (
        f"The {first} {who} {verb} to the {second} {where} in the {when}.",
        f"In the {when} the {first} {who} {verb} to the {where}.",
        f"The {who} and the {rng.choice(_PEOPLE)} {verb} to the {second} {where}.",
    )
    return rng.choice(forms)


def haystack_sentences(rng: random.Random) -> Iterator[str]:
    """Endless filler."""
    while True:
        yield haystack_sentence(rng)


def vocabulary() -> list[str]:
    """Every word and stop that texts made here can hold, in lower case, each once, in order."""
    groups = (_STOPS, _GLUE, KEYS, VALUES, _ADJECTIVES, _PEOPLE, _VERBS, _PLACES, _TIMES)
    return list(dict.fromkeys(word.lower() for group in groups for word in group))
