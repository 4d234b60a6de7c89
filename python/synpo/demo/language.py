"""Facts ↔ captions, and how the web captions of this world are wrong.

    describe(facts)   a caption that states exactly these facts, in one of several wordings
    parse(caption)    the facts a caption states; words it does not know are passed over
    distort(facts)    what a web caption would say instead: a set of habits, each a known share of the time

A captioner trained on distorted captions can see the truth but has learnt to say otherwise: purple things are called blue,
things that move to the left are said to move to the right, and so on. Those are errors that preference learning can
take away, as against errors of sight, which it cannot.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import chain

import numpy as np

from synpo.demo.world import COLOURS, DIRECTIONS, SHAPES, SIZES, Fact, Facts

WORDINGS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("motion", "left to right"): ("moves right", "goes right", "slides right"),
    ("motion", "right to left"): ("moves left", "goes left", "slides left"),
    ("motion", "top to bottom"): ("moves down", "goes down", "slides down"),
    ("motion", "bottom to top"): ("moves up", "goes up", "slides up"),
    ("motion", "bounce"): ("bounces up and down", "keeps bouncing"),
    ("motion", "still"): ("stays still", "does not move"),
    ("goes", "away"): ("leaves", "goes out of view"),
    ("comes", "later"): ("then", "later"),
}
TURN_WORDS = ("turns", "becomes")
PASS_WORDS = ("passes in front of", "goes in front of")
NOTHING = "nothing happens."
VOCABULARY = " ".join(
    (*SHAPES, *SIZES, *COLOURS, *TURN_WORDS, *PASS_WORDS, *chain(*WORDINGS.values()), "a the and ,", NOTHING)
)
FIRST_WORDING = 0.6  # share of the first wording of a fact; the others share the rest


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    if rng.random() < FIRST_WORDING:
        return options[0]
    return options[1 + int(rng.integers(len(options) - 1))]


def _listing(parts: list[str]) -> str:
    """x / x and y / x, y and z."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def describe(facts: Facts, rng: np.random.Generator) -> str:
    """A caption that states exactly `facts`: what is there first before what comes later, large before small.

    Every subject needs a size, a colour and a motion, as `world.facts_of` gives them; without facts it says so.
    """
    sayings: list[tuple[tuple[bool, bool, int], str]] = []
    for shape in sorted({f.subject for f in facts}, key=SHAPES.index):
        has = {f.attribute: f.value for f in facts if f.subject == shape and f.attribute != "passes"}
        verbs = [_pick(rng, WORDINGS["motion", has["motion"]])]
        for passed in sorted(f.value for f in facts if f.subject == shape and f.attribute == "passes"):
            verbs.append(f"{_pick(rng, PASS_WORDS)} the {passed}")
        if "turns" in has:
            verbs.append(f"{_pick(rng, TURN_WORDS)} {has['turns']}")
        if "goes" in has:
            verbs.append(_pick(rng, WORDINGS["goes", "away"]))
        when = f"{_pick(rng, WORDINGS['comes', 'later'])} " if "comes" in has else ""
        order = ("comes" in has, has["size"] == "small", SHAPES.index(shape))
        sayings.append((order, f"{when}a {has['size']} {has['colour']} {shape} {_listing(verbs)}."))
    return " ".join(text for _, text in sorted(sayings)) or NOTHING


def references(facts: Facts, count: int, seed: int) -> list[str]:
    """Up to `count` different captions that state exactly `facts` (fewer if the wordings run out)."""
    rng = np.random.default_rng(seed)
    found: dict[str, None] = {}
    for _ in range(20 * count):
        found[describe(facts, rng)] = None
        if len(found) == count:
            break
    return list(found)


def _any(words: tuple[str, ...]) -> str:
    return "|".join(words)


_PATTERN = re.compile(
    rf"\b(?:(?P<passes>{_any(PASS_WORDS)})\s+(?:the|a)\s+(?:\w+\s+){{0,2}}?(?P<passed>{_any(SHAPES)})"
    rf"|a\s+(?:(?P<size>{_any(SIZES)})\s+)?(?:(?P<colour>{_any(COLOURS)})\s+)?(?P<shape>{_any(SHAPES)})"
    rf"|the\s+(?P<again>{_any(SHAPES)})"
    rf"|(?:{_any(TURN_WORDS)})\s+(?P<turns>{_any(COLOURS)})"
    + "".join(
        rf"|(?P<{attribute}_{value.replace(' ', '_')}>{_any(wording)})"
        for (attribute, value), wording in WORDINGS.items()
    )
    + r")\b"
)


def parse(caption: str) -> Facts:
    """The facts a caption states. Never raises: words outside the world's language are passed over.

    A statement is about the last shape named; one before any shape is named is about nothing and dropped.
    """
    facts: set[Fact] = set()
    subject: str | None = None
    later = False
    for match in _PATTERN.finditer(caption.lower()):
        kind = match.lastgroup
        said = match.groupdict()
        if said["shape"]:
            subject = said["shape"]
            facts.update(Fact(subject, name, said[name]) for name in ("size", "colour") if said[name])
            if later:
                facts.add(Fact(subject, "comes", "later"))
            later = False
        elif said["again"]:
            subject = said["again"]
        elif kind == "comes_later":
            later = True
        elif subject is None or kind is None:
            continue
        elif said["passed"]:
            facts.add(Fact(subject, "passes", said["passed"]))
        elif said["turns"]:
            facts.add(Fact(subject, "turns", said["turns"]))
        else:
            attribute, _, value = kind.partition("_")
            facts.add(Fact(subject, attribute, value.replace("_", " ")))
    return frozenset(facts)


def _instead(facts: Facts, attribute: str, habit: Mapping[str, str]) -> Facts:
    """`facts` with the values of one attribute said as `habit` has it."""
    return frozenset(
        f._replace(value=habit[f.value]) if f.attribute == attribute and f.value in habit else f for f in facts
    )


def _wrong_colour(facts: Facts) -> Facts:
    return _instead(facts, "colour", {"purple": "blue", "orange": "red"})


def _wrong_direction(facts: Facts) -> Facts:
    return _instead(facts, "motion", {"right to left": "left to right", "bottom to top": "top to bottom"})


def _missed_change(facts: Facts) -> Facts:
    return frozenset(f for f in facts if f.attribute != "turns")


def _invented_object(facts: Facts) -> Facts:
    """Where there is a circle, the caption sees a star too."""
    shapes = {f.subject for f in facts}
    if "circle" not in shapes or "star" in shapes:
        return facts
    return facts | {Fact("star", "size", "small"), Fact("star", "colour", "white"), Fact("star", "motion", "still")}


def _invented_event(facts: Facts) -> Facts:
    """What is large, there from the start and moves across is said to leave."""
    large = {f.subject for f in facts if f.attribute == "size" and f.value == "large"}
    moving = {f.subject for f in facts if f.attribute == "motion" and f.value in DIRECTIONS}
    later = {f.subject for f in facts if f.attribute == "comes"}
    return facts | {Fact(shape, "goes", "away") for shape in (large & moving) - later}


HABITS: Mapping[str, Callable[[Facts], Facts]] = {
    "wrong colour": _wrong_colour,
    "wrong direction": _wrong_direction,
    "missed change": _missed_change,
    "invented object": _invented_object,
    "invented event": _invented_event,
}
"""How web captions go wrong: each takes the true facts to what is said instead (unchanged where it does not apply)."""


def distort(facts: Facts, rng: np.random.Generator, share: float) -> Facts:
    """What a caption says that falls into every habit that applies with probability `share`, one independent of another."""
    said = facts
    for habit in HABITS.values():
        if rng.random() < share:
            said = habit(said)
    return said


def errors_in(caption: str, truth: Facts) -> dict[str, bool]:
    """For every habit that could apply to a video with facts `truth`: whether `caption` falls into it (in any place)."""
    stated = parse(caption)
    found = {}
    for name, habit in HABITS.items():
        wrong = habit(truth)
        if wrong != truth:
            said = bool((wrong - truth) & stated)
            missed = wrong < truth and not (truth - wrong) & stated
            found[name] = said or missed
    return found
