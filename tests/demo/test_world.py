"""The demo's world: the same scene from the same seed, and facts that agree with where things are."""

import dataclasses

import numpy as np
import pytest

from synpo.demo.world import (
    DIRECTIONS,
    DURATIONS,
    STEPS,
    Body,
    Fact,
    Passing,
    Scene,
    facts_of,
    make_scene,
    make_split,
    path_of,
)

SCENES = make_split(seed=3, split="train", count=200)


def test_equal_arguments_give_equal_scenes_and_others_do_not() -> None:
    assert make_split(3, "train", 20) == SCENES[:20]
    assert make_scene(3, 7, "test") != make_scene(3, 7, "train")
    assert make_scene(4, 7) != make_scene(3, 7)
    assert len({dataclasses.replace(s, id="") for s in SCENES}) == len(SCENES)


def test_scenes_keep_to_their_limits() -> None:
    for scene in SCENES:
        assert DURATIONS[0] <= scene.duration <= DURATIONS[1]
        shapes = [b.shape for b in scene.bodies]
        assert 1 <= len(shapes) == len(set(shapes)) <= 3
        assert all(b.turns != b.colour for b in scene.bodies)
    assert {len(s.bodies) for s in SCENES} == {1, 2, 3}


def test_a_body_goes_where_its_motion_says() -> None:
    for scene in SCENES:
        for body in scene.bodies:
            end = scene.duration if body.end is None else body.end
            centre, there = path_of(body, scene.duration, np.linspace(body.start, end, 50))
            assert there.all()
            way = centre[-1] - centre[0]
            if body.motion in DIRECTIONS:
                step = np.array(STEPS[body.motion])
                assert way @ step > 0.35 and abs(way @ step[::-1]) < 1e-9
            elif body.motion == "still":
                assert np.ptp(centre, axis=0).max() == 0
            else:
                assert np.ptp(centre[:, 1]) > 0.3 and np.ptp(centre[:, 0]) == 0


def test_every_body_has_its_facts_in_the_whole_video() -> None:
    for scene in SCENES:
        facts = facts_of(scene)
        for body in scene.bodies:
            assert {
                Fact(body.shape, "size", body.size),
                Fact(body.shape, "colour", body.colour),
                Fact(body.shape, "motion", body.motion),
            } <= facts
            assert (Fact(body.shape, "comes", "later") in facts) == (body.start > 0)
            assert (Fact(body.shape, "goes", "away") in facts) == (body.end is not None)


@pytest.fixture
def scene() -> Scene:
    """A circle crosses in 8 s, turns blue at 5 s and leaves at 7 s; a square waits; a star comes at 5 s."""
    circle = Body("circle", "small", "red", "left to right", 0.1, (0.2, 0.5), (1.1, 0.5), end=7.0)
    circle = dataclasses.replace(circle, turns="blue", turn_time=5.0)
    square = Body("square", "large", "green", "still", 0.2, (0.5, 0.5), (0.5, 0.5))
    star = Body("star", "small", "white", "still", 0.1, (0.1, 0.1), (0.1, 0.1), start=5.0)
    return Scene("x", 0, 8.0, (square, circle, star), (Passing("circle", "square", 2.5),))


def test_facts_of_a_whole_scene(scene: Scene) -> None:
    assert facts_of(scene) == {
        Fact("circle", "size", "small"),
        Fact("circle", "colour", "red"),
        Fact("circle", "motion", "left to right"),
        Fact("circle", "turns", "blue"),
        Fact("circle", "goes", "away"),
        Fact("circle", "passes", "square"),
        Fact("square", "size", "large"),
        Fact("square", "colour", "green"),
        Fact("square", "motion", "still"),
        Fact("star", "size", "small"),
        Fact("star", "colour", "white"),
        Fact("star", "motion", "still"),
        Fact("star", "comes", "later"),
    }


def test_facts_of_clips_are_those_seen_in_them(scene: Scene) -> None:
    first, second = facts_of(scene, 0, 4), facts_of(scene, 4, 8)
    assert {f.subject for f in first} == {"circle", "square"}
    assert Fact("circle", "passes", "square") in first and Fact("circle", "passes", "square") not in second
    assert {f.attribute for f in first if f.subject == "circle"} == {"size", "colour", "motion", "passes"}
    assert {Fact("circle", "turns", "blue"), Fact("circle", "goes", "away"), Fact("star", "comes", "later")} <= second
    # a change within an eighth of the clip's ends cannot be told: the circle simply is blue
    assert Fact("circle", "colour", "blue") in facts_of(scene, 4.9, 8.0)
