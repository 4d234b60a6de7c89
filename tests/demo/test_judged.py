"""The demo's pairs beside the facts: shares of right and wrong verdicts, and the errors of either side."""

from pathlib import Path

import numpy as np

from synpo.demo.judged import groups, habits, sides
from synpo.demo.language import HABITS, describe
from synpo.demo.render import render
from synpo.demo.world import facts_of, make_split
from synpo.records import Pair


def test_verdicts_are_counted_and_shown_both_ways(tmp_path: Path) -> None:
    scenes = make_split(0, "pairs", 10)
    rng = np.random.default_rng(0)
    true = {scene.video: describe(facts_of(scene), rng) for scene in scenes}
    silence = "nothing happens."
    answers = [
        (text, silence) if i < 6 else (silence, text) if i < 8 else (text, text) for i, text in enumerate(true.values())
    ]
    pairs = [Pair(video, video, "?", *both) for video, both in zip(true, answers)]
    for scene in scenes[:2]:
        render(scene, tmp_path)
    right, wrong, alike = groups(pairs, scenes, tmp_path)
    assert (
        "In 60 % of the 10 pairs the caption it chose is the truer one (fact F1), in 20 % the one it rejected"
        in right.note
    )
    assert [sample.video for sample in right.samples] == list(true)[:3]
    assert {sample.video for sample in wrong.samples} == set(list(true)[6:8])
    assert [sample.video for sample in alike.samples] == list(true)[8:9]
    assert [sample.image is not None for sample in right.samples] == [True, True, False]
    assert {sample.remarks for sample in right.samples} == {("fact F1 100", "fact F1 0")}


def test_errors_of_either_side() -> None:
    scenes = make_split(0, "pairs", 40)
    rng = np.random.default_rng(0)
    habit = HABITS["missed change"]
    pairs = [
        Pair(s.video, s.video, "?", describe(facts_of(s), rng), describe(habit(facts_of(s)), rng)) for s in scenes[:30]
    ]
    found = habits(sides(pairs), scenes)
    assert list(found) == ["chosen", "rejected"]
    assert set(found["chosen"].values()) == {0.0}
    assert found["rejected"]["missed change"] == 1.0
