"""The demo's preference pairs beside what is true of their videos: how often the judge was right, and the pairs that show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from synpo.demo.language import errors_in, parse
from synpo.demo.world import Facts, Scene, facts_of
from synpo.evaluate.facts import fact_scores
from synpo.records import Pair
from synpo.report.frames import strip
from synpo.report.page import Group, PairSample

RIGHT, WRONG, ALIKE = 3, 2, 1  # pairs shown in which the chosen caption is the truer one, the rejected one, neither


def habits(captions: Mapping[str, Mapping[str, str]], scenes: Sequence[Scene]) -> dict[str, dict[str, float]]:
    """Name of a set of captions → learnt error → share of the videos it could apply to in which the caption falls into it.

    Args:
        captions: name → video → caption; videos of `scenes` that have none are left out.
    """
    shares: dict[str, dict[str, float]] = {}
    for name, said in captions.items():
        seen: dict[str, list[bool]] = {}
        for scene in scenes:
            if scene.video in said:
                for habit, fell in errors_in(said[scene.video], facts_of(scene)).items():
                    seen.setdefault(habit, []).append(fell)
        shares[name] = {habit: sum(falls) / len(falls) for habit, falls in sorted(seen.items())}
    return shares


def sides(pairs: Sequence[Pair]) -> dict[str, dict[str, str]]:
    """ "chosen", "rejected" → video → caption."""
    return {side: {pair.video or "": getattr(pair, side) for pair in pairs} for side in ("chosen", "rejected")}


def groups(pairs: Sequence[Pair], scenes: Sequence[Scene], folder: Path) -> list[Group]:
    """Pairs in which the judge was most right, and most wrong; `folder` holds their videos."""
    truth: dict[str, Facts] = {scene.video: facts_of(scene) for scene in scenes}
    true = {pair.video: truth[pair.video] for pair in pairs if pair.video is not None}
    f1 = {
        side: fact_scores({video: parse(said[video]) for video in true}, true).per_video["F1"]
        for side, said in sides(pairs).items()
    }
    gaps = [a - b for a, b in zip(f1["chosen"], f1["rejected"])]
    order = sorted(range(len(pairs)), key=lambda i: -gaps[i])
    right, wrong = [i for i in order if gaps[i] > 0], [i for i in reversed(order) if gaps[i] < 0]
    alike = [i for i in order if gaps[i] == 0]
    shares = [round(100 * len(part) / len(pairs)) for part in (right, wrong)]
    told = (
        f"The judge saw neither the scenes nor their facts. In {shares[0]} % of the {len(pairs)} pairs the caption it chose "
        f"is the truer one (fact F1), in {shares[1]} % the one it rejected, in the others both are as true."
    )

    def sample(i: int) -> PairSample:
        pair, scores = pairs[i], (f1["chosen"][i], f1["rejected"][i])
        image = strip(folder, pair.video or "")
        remarks = (f"fact F1 {100 * scores[0]:.0f}", f"fact F1 {100 * scores[1]:.0f}")
        return PairSample(pair.video, pair.chosen, pair.rejected, image, remarks=remarks)

    marked = "Words that only one of the two has are marked."
    found = [
        ("Judged rightly", f"{told} Here the clearest. {marked}", right[:RIGHT]),
        ("Judged wrongly", "Here the rejected caption is the truer one, the worst first.", wrong[:WRONG]),
        ("Neither is truer", "Such pairs teach a taste, not facts.", alike[:ALIKE]),
    ]
    return [Group(title, note, [sample(i) for i in shown]) for title, note, shown in found if shown]
