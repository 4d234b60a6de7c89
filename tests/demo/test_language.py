"""The demo's language: captions state exactly their facts, and web captions are wrong as often and in the ways they say."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from synpo.demo.language import HABITS, WORDINGS, describe, distort, errors_in, parse, references
from synpo.demo.world import COLOURS, SHAPES, SIZES, Fact, Facts, facts_of, make_split

SCENES = make_split(seed=1, split="test", count=300)
WORDS = sorted(
    {w for options in WORDINGS.values() for o in options for w in o.split()}
    | {*SHAPES, *SIZES, *COLOURS, "a", "the", "turns", "becomes", "passes", "in", "front", "of", "and", ".", ","}
)


def thing(shape: str, colour: str, motion: str, size: str = "small", **more: str) -> set[Fact]:
    values = {"size": size, "colour": colour, "motion": motion, **more}
    return {Fact(shape, attribute, value) for attribute, value in values.items()}


def test_every_reference_parses_exactly_to_its_facts() -> None:
    for scene in SCENES:
        for stretch in ((0, scene.duration), (0, scene.duration / 2), (scene.duration / 2, scene.duration)):
            facts = facts_of(scene, *stretch)
            captions = references(facts, 5, seed=scene.seed)
            assert len(captions) == len(set(captions)) >= min(2, len(captions))
            for caption in captions:
                assert parse(caption) == facts, caption


def test_references_vary_and_follow_from_their_seed() -> None:
    facts = facts_of(max(SCENES, key=lambda s: len(s.bodies)))
    assert len(references(facts, 5, seed=0)) == 5
    assert references(facts, 5, seed=0) == references(facts, 5, seed=0) != references(facts, 5, seed=1)


def test_a_caption_in_words() -> None:
    caption = "A large red circle slides right, passes in front of the star and turns blue. Later a cross leaves."
    assert parse(caption) == {
        *thing("circle", "red", "left to right", "large", turns="blue", passes="star"),
        Fact("cross", "comes", "later"),
        Fact("cross", "goes", "away"),
    }
    assert parse("the cross stays still") == {Fact("cross", "motion", "still")}
    assert parse("a purple elephant turns red") == frozenset()  # about nothing the world has


@given(st.text() | st.lists(st.sampled_from(WORDS), max_size=40).map(" ".join))
def test_anything_parses_without_raising(caption: str) -> None:
    for fact in parse(caption):
        assert fact.subject in SHAPES and fact.value


HABIT_CASES: dict[str, tuple[set[Fact], set[Fact]]] = {
    "wrong colour": (thing("square", "purple", "still"), thing("square", "blue", "still")),
    "wrong direction": (thing("square", "red", "bottom to top"), thing("square", "red", "top to bottom")),
    "missed change": (thing("square", "red", "still", turns="blue"), thing("square", "red", "still")),
    "invented object": (
        thing("circle", "red", "still"),
        thing("circle", "red", "still") | thing("star", "white", "still"),
    ),
    "invented event": (
        thing("square", "red", "left to right", "large"),
        thing("square", "red", "left to right", "large", goes="away"),
    ),
}


@pytest.mark.parametrize("name", HABITS)
def test_a_habit_changes_facts_as_it_says(name: str) -> None:
    true, said = HABIT_CASES[name]
    assert HABITS[name](frozenset(true)) == said
    rng = np.random.default_rng(0)
    assert errors_in(describe(frozenset(said), rng), frozenset(true))[name]
    assert not errors_in(describe(frozenset(true), rng), frozenset(true))[name]
    untouched: Facts = frozenset(thing("cross", "white", "bounce"))
    assert HABITS[name](untouched) == untouched
    assert errors_in(describe(untouched, rng), untouched) == {}


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_captions_is_wrong(share: float) -> None:
    rng = np.random.default_rng(0)
    fallen: dict[str, list[bool]] = {name: [] for name in HABITS}
    for scene in SCENES:
        truth = facts_of(scene)
        for name, wrong in errors_in(describe(distort(truth, rng, share), rng), truth).items():
            fallen[name].append(wrong)
    for name, cases in fallen.items():
        assert len(cases) > 30
        slack = 0 if share in (0.0, 1.0) else 4 * (share * (1 - share) / len(cases)) ** 0.5
        assert abs(np.mean(cases) - share) <= slack, name
