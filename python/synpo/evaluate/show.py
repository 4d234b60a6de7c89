"""What an evaluation came to, in the terms of a report: sentences, large figures, and the captions that tell most.

The last system of a result is what the page is about, the first one what it is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from synpo.evaluate.run import CAPTIONS, EvalResult
from synpo.evaluate.scores import count
from synpo.machine import described
from synpo.records import Pair
from synpo.report.page import Group, Highlight, Report, Sample, write_report
from synpo.report.parts import PairSample

EACH, SAME = 4, 2  # videos shown of those that gained, and of those that lost; of those where nothing changed
WORDS = {
    "fact F1": "Every caption is read as statements (“the circle is red”). Precision is the share of its statements that are "
    "true, recall the share of what is true that it states, F1 their harmonic mean: 100 is all of the truth and nothing else.",
    "CIDEr": "How many runs of one to four words a caption shares with the reference captions, rare ones counting more. The "
    "usual score of captions; here times 100, as papers print it, up to 1000.",
    "BLEU-4": "Share of a caption's runs of one to four words that some reference has.",
    "ROUGE-L": "How much of a reference's order of words the caption keeps.",
    "METEOR": "Words shared with a reference, where other forms and synonyms count too.",
    "accuracy": "Share of pairs whose chosen answer the model finds more likely, a token, than the rejected one; a tie counts "
    "one half.",
    "margin": "How much likelier a token of the chosen answer is than one of the rejected: the difference of their "
    "log-likelihoods.",
    "chosen": "Log-likelihood of the chosen answer: natural logarithm of the probability of a token given the prompt and what "
    "comes before, the mean over its tokens. 0 is certain, −0.7 one in two.",
    "rejected": "The same of the rejected answer. It may rise with the chosen one's: what counts is the margin.",
}
Picture = Callable[[str], bytes | None]


def words(result: EvalResult) -> list[tuple[str, str]]:
    """The metrics of the result and its intervals, explained."""
    there = {metric for scores in result.scores.values() for metric in scores.corpus}
    items = f"{result.kind.noun}s"
    ranges = (
        f"A range after or below a figure holds what 95 in 100 draws of as many {items} would give (bootstrap). Where the range "
        f"of a difference leaves out 0, the {items} tell the two apart; it says nothing of other seeds."
    )
    return [(name, meaning) for name, meaning in WORDS.items() if name in there] + [("ranges", ranges)]


def findings(result: EvalResult) -> list[str]:
    """A sentence for each other system: how the last one compares in the main metric."""
    said = []
    for (system, other), found in result.differences.items():
        if system != result.systems[-1] or (d := found[result.main]) is None:
            continue
        verdict = (
            "better" if d.low > 0 else "worse" if d.high < 0 else f"these {result.kind.noun}s do not tell them apart"
        )
        show = partial(result.kind.figure, result.main)
        figures = f"{result.main} {show(d.value, '+')} ({show(d.low)} to {show(d.high)})"
        said.append(f"{system} against {other}: {figures}, {verdict}.")
    return said


def highlights(result: EvalResult) -> list[Highlight]:
    """The main metric of every system."""
    tiles, show = [], partial(result.kind.figure, result.main)
    for system, scores in result.scores.items():
        interval = result.intervals[system][result.main]
        around = f" · {show(interval.low)} to {show(interval.high)}" if interval else ""
        tiles.append(Highlight(system, show(scores.corpus[result.main]), result.main + around, system))
    return tiles


def groups(
    result: EvalResult,
    captions: Mapping[str, Mapping[str, str]],
    references: Mapping[str, Sequence[str]],
    picture: Picture,
) -> list[Group]:
    """The captions that gained most over the baseline and those that lost most; of a single system the best and the worst.

    Args:
        captions: system → video → caption. references: video → captions.
        picture: frames of a video, None where there are none.
    """
    scores = {s: dict(zip(result.videos, found.per_video[result.main])) for s, found in result.scores.items()}
    system, total, metric = result.systems[-1], len(result.videos), result.main

    def sample(video: str) -> Sample:
        said = {s: f"{metric} {100 * each[video]:.0f}" for s, each in scores.items()}
        told = {s: texts[video] for s, texts in captions.items()}
        return Sample(video, references[video], told, picture(video), said)

    if system == result.baseline:
        order = sorted(result.videos, key=lambda video: -scores[system][video])
        best, worst = order[: min(EACH, -(-total // 2))], order[::-1][: min(EACH, total // 2)]
        return [
            Group("The best", f"{metric} of {count(total, 'video')}; here the highest.", [*map(sample, best)]),
            Group("The worst", "And the lowest, the worst first.", [*map(sample, worst)]),
        ][: 2 if worst else 1]
    changes = result.changes(system)
    found = []
    for title, verb, gains in (
        (f"Better with {system}", "gained", [video for video, gain in changes if gain > 0]),
        (f"Worse with {system}", "lost", [video for video, gain in reversed(changes) if gain < 0]),
    ):
        if gains:
            note = (
                f"{len(gains)} of {count(total, 'video')} {verb} in {metric} over {result.baseline}; here those that {verb} "
                "most. Words that no reference uses are underlined; they may still be true."
            )
            found.append(Group(title, note, [sample(video) for video in gains[:EACH]]))
    if same := [video for video, gain in changes if gain == 0]:
        note = f"{len(same)} of {count(total, 'video')} have the same {metric}."
        found.append(Group(f"As with {result.baseline}", note, [sample(video) for video in same[:SAME]]))
    return found


def pair_groups(
    result: EvalResult, pairs: Mapping[str, Pair], answers: Mapping[str, Mapping[str, str | None]], picture: Picture
) -> list[Group]:
    """The pairs in which the margin grew and fell most over the baseline; of a single system the widest and the narrowest.

    Args:
        pairs: id → pair. answers: system → pair id → what the system itself says to the prompt, None where it was not asked.
        picture: frames of a video, None where there are none.
    """
    system, total = result.systems[-1], count(len(pairs), "pair")
    likely = {
        s: {side: dict(zip(result.videos, found.per_video[side])) for side in ("chosen", "rejected")}
        for s, found in result.scores.items()
    }

    def of(side: str, key: str) -> str:
        figures = {s: f"{each[side][key]:.3f}" for s, each in likely.items()}
        return ", ".join(f"{s} {x}" for s, x in figures.items()) if len(figures) > 1 else figures[system]

    def sample(key: str) -> PairSample:
        pair = pairs[key]
        said = {s: text for s, each in answers.items() if (text := each[key]) is not None}
        prompt = pair.prompt if isinstance(pair.prompt, str) else pair.prompt[-1]["content"]
        image = picture(pair.video) if pair.video else None
        return PairSample(
            pair.video,
            pair.chosen,
            pair.rejected,
            image,
            prompt,
            (of("chosen", key), of("rejected", key)),
            answers=said,
        )

    if system == result.baseline:
        margins = sorted(zip(result.scores[system].per_video["margin"], result.videos), reverse=True)
        widest = [key for margin, key in margins if margin > 0]
        wrong = [key for margin, key in reversed(margins) if margin <= 0]
        found = [
            (f"{len(widest)} of {total}: the chosen answer is more likely", "Here the widest margins.", widest),
            (f"{len(wrong)} of {total}: it is not", "Here those that are furthest off.", wrong),
        ]
    else:
        changes = result.changes(system, "margin")
        gained, lost = [key for key, gain in changes if gain > 0], [key for key, gain in reversed(changes) if gain < 0]
        found = [
            (
                f"The margin grew in {len(gained)} of {total}",
                f"Over {result.baseline}; here those where it grew most.",
                gained,
            ),
            (f"It fell in {len(lost)} of {total}", "Here those where it fell most.", lost),
        ]
    return [Group(title, note, [sample(key) for key in keys[:EACH]]) for title, note, keys in found if keys]


def show(
    output: Path,
    model: str,
    result: EvalResult,
    shown: Sequence[Group],
    run: Mapping[str, str],
    figures: Mapping[str, Any],
) -> Path:
    """Write output/report.html of `synpo eval` and return its path.

    Args:
        model: its path or id, with its adapter. shown: `groups` or `pair_groups`.
        run: what else to say of the run, name → text. figures: the content of scores.json.
    """
    against = f", beside {', '.join(result.systems[:-1])}" if len(result.systems) > 1 else ""
    report = Report(
        title="Evaluation",
        lead=f"{result.systems[-1]}: {model}. {count(len(result.videos), result.kind.noun)}{against}.",
        findings=findings(result),
        highlights=highlights(result),
        terms=words(result),
        systems=result.systems,
        charts=result.to_charts(),
        tables=result.to_tables(),
        captions=shown if result.kind is CAPTIONS else (),
        pairs=shown if result.kind is not CAPTIONS else (),
        run={**described(), **run},
        figures=figures,
        beside="scores.json",
    )
    path = output / "report.html"
    write_report(path, report)
    return path
