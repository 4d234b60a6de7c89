"""The offline judge against captions whose errors are known."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from synpo.pipeline.judge.audit import compare, spearman
from synpo.pipeline.judge.base import Task, Verdict
from synpo.pipeline.judge.ngrams import Bigrams, claims_of, document_frequency, grams_of, mean_similarity
from synpo.pipeline.judge.offline import OfflineJudge, form

COLOURS = ["red", "green", "blue", "white", "black", "brown"]
ANIMALS = ["dog", "cat", "horse", "bird", "fox"]
PLACES = ["across a meadow", "along a beach", "through a forest", "past a fence"]
PACES = {"fast": ["runs", "races", "dashes"], "slow": ["walks", "strolls", "wanders"]}  # the first is the usual wording
SIDES = ["from left to right", "from right to left"]
Scene = list[tuple[str, str, str, str, str]]


def draw(rng: random.Random) -> Scene:
    return [
        (rng.choice(COLOURS), animal, rng.choice(list(PACES)), rng.choice(PLACES), rng.choice(SIDES))
        for animal in rng.sample(ANIMALS, 2)
    ]


def corrupt(scene: Scene, rng: random.Random, share: float) -> tuple[Scene, int]:
    """Say each attribute wrongly with probability `share`; returns what is said and the number of errors."""
    options = (COLOURS, ANIMALS, list(PACES), PLACES, SIDES)
    said = [tuple(rng.choice(o) if rng.random() < share else x for x, o in zip(row, options)) for row in scene]
    return said, sum(a != b for x, y in zip(scene, said) for a, b in zip(x, y))  # type: ignore[return-value]


def tell(scene: Scene, rng: random.Random) -> str:
    return " ".join(
        f"A {colour} {animal} {rng.choice(PACES[pace])} {place} {side}." for colour, animal, pace, place, side in scene
    )


def pool(videos: int = 60, candidates: int = 8, seed: int = 0) -> tuple[list[Task], list[list[int]]]:
    """Tasks whose candidates get an eighth to a half of their attributes wrong, and how many errors each makes."""
    rng = random.Random(seed)
    tasks, errors = [], []
    for number in range(videos):
        scene = draw(rng)
        evidence = tuple(tell(corrupt(scene, rng, 0.15)[0], rng) for _ in range(2))
        said = [corrupt(scene, rng, 0.5 * rng.random()) for _ in range(candidates)]
        tasks.append(Task(f"{number}.mp4", evidence, tuple(tell(s, rng) for s, _ in said), (-1.0,) * candidates))
        errors.append([n for _, n in said])
    return tasks, errors


def verdicts(judge: OfflineJudge, task: Task) -> list[Verdict]:
    found = judge.score(task)
    assert all(isinstance(v, Verdict) for v in found)
    return [v for v in found if isinstance(v, Verdict)]


@pytest.fixture(scope="module")
def judged() -> tuple[list[list[Verdict]], list[list[int]]]:
    tasks, errors = pool()
    judge = OfflineJudge()
    judge.prepare(tasks)
    return [verdicts(judge, t) for t in tasks], errors


def test_totals_follow_the_truth(judged: tuple[list[list[Verdict]], list[list[int]]]) -> None:
    rows, errors = judged
    truth = [[-float(n) for n in row] for row in errors]
    for part, least in (("total", 0.75), ("factuality", 0.75), ("consistency", 0.6)):
        found = compare(part, [[getattr(v, part) for v in row] for row in rows], truth)
        assert found.spearman is not None and found.spearman > least, part
        assert found.accuracy is not None and found.accuracy > 0.8, part


def test_the_margin_of_four_is_reached_and_kept_pairs_are_right(
    judged: tuple[list[list[Verdict]], list[list[int]]],
) -> None:
    rows, errors = judged
    kept = []
    for row, wrong in zip(rows, errors):
        totals = [v.total for v in row]
        if max(totals) - min(totals) >= 4:
            kept.append(wrong[int(np.argmin(totals))] - wrong[int(np.argmax(totals))])
    assert len(kept) > 0.4 * len(rows)
    assert np.mean([k > 0 for k in kept]) > 0.95


def test_the_scales_are_used_from_end_to_end(judged: tuple[list[list[Verdict]], list[list[int]]]) -> None:
    everything = [v for row in judged[0] for v in row]
    for part, top in (("factuality", 5.0), ("consistency", 3.0)):
        values = [getattr(v, part) for v in everything]
        assert min(values) == 0 and max(values) == top
        assert 0.1 * top < np.std(values) < 0.4 * top


def test_a_wording_speaks_for_its_paraphrase_and_not_for_its_opposite() -> None:
    tasks, _ = pool(200)
    judge = OfflineJudge()
    judge.prepare(tasks)

    def speaks(e: str, c: str) -> float:
        (left,), (right,) = claims_of(e), claims_of(c)
        return float(judge._company[judge._known[left], judge._known[right]])

    assert speaks("meadow left", "meadow left") == 1
    assert speaks("beach left", "forest left") < 0.15
    same = np.mean(
        [speaks(f"{a} {w}", f"{a} {v}") for a in ANIMALS for w, v in (("runs", "races"), ("walks", "strolls"))]
    )
    other = np.mean(
        [speaks(f"{a} {w}", f"{a} {v}") for a in ANIMALS for w, v in (("runs", "walks"), ("races", "strolls"))]
    )
    assert same > 0.5 and other < 0.3


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("A red dog runs along a beach from left to right.", "A blue dog runs along a beach from left to right."),
        ("A red dog runs along a beach from left to right.", "A red dog runs along a beach from right to left."),
        (
            "A red dog runs along a beach from left to right.",
            "A red dog runs along a beach from left to right. A cat walks.",
        ),
        ("A red dog runs along a beach from left to right.", "A red dog runs."),
    ],
    ids=["colour", "direction", "invented", "left out"],
)
def test_one_error_costs_factuality(right: str, wrong: str) -> None:
    tasks, _ = pool()
    task = Task("x.mp4", (right, right), (right, right, right, wrong), (-1.0,) * 4)
    judge = OfflineJudge()
    judge.prepare([*tasks, task])
    good, _, _, bad = verdicts(judge, task)
    assert good.factuality > bad.factuality + 0.1


def test_fluency_falls_with_loops_fragments_and_word_salad() -> None:
    tasks, _ = pool()
    good = tasks[0].candidates[0]
    words = good.rstrip(".").split()
    random.Random(1).shuffle(words)
    task = Task(
        "x.mp4", tasks[0].evidence,
        (good, "a dog and a dog and a dog and a dog and", " ".join(words) + ".", good.rsplit(" ", 4)[0], "...", good),
        (-1.0, -1.0, -1.0, -1.0, -1.0, -50.0),
    )  # fmt: skip
    judge = OfflineJudge()
    judge.prepare([*tasks, task])
    fine, loop, salad, cut, nothing, unlikely = (v.fluency for v in verdicts(judge, task))
    assert fine > 4 and loop < 2 and salad < fine and cut < 0.85 * fine and nothing == 0 and unlikely < fine


def test_form_is_what_it_says() -> None:
    assert form("A dog runs. A cat walks.") == 1
    assert form("A dog runs. A dog runs.") == 0.5 * (1 - 3 / 6)
    assert form("a dog runs") == pytest.approx(0.8)
    assert form("red red red.") == pytest.approx(1 / 3)
    assert form("") == form("?!") == 0


def test_claims_are_ordered_pairs_within_a_sentence() -> None:
    assert claims_of("A red circle moves.") == {("red", "circl"), ("red", "mov"), ("circl", "mov")}
    assert claims_of("Left to right") == {("left", "right")} and claims_of("right to left") == {("right", "left")}
    assert claims_of("Red. Circle.") == {("red", "red"), ("circl", "circl")}
    assert claims_of("the of and") == set()


def test_similarity_and_bigrams_by_hand() -> None:
    texts = ["a b", "a b", "c d"]
    idf = {g: 1.0 for t in texts for g in grams_of(t)}
    assert mean_similarity(texts, idf, longest=2) == pytest.approx([0.5, 0.5, 0.0])
    assert mean_similarity(["alone"], idf).tolist() == [0.0]
    assert document_frequency([{"x"}, {"x", "y"}]) == {"x": 2, "y": 1}
    model = Bigrams(["a b", "a c"])
    (logp,) = model.logps(["a b"], without=Bigrams([]))
    # words: "" twice, a twice, b, c; p(a | "") = ¾ + ¼·3/(6 + 4), p(b | a) = ⅜ + ¼·2/10
    assert logp == pytest.approx(np.mean(np.log([0.75 + 0.25 * 0.3, 0.375 + 0.25 * 0.2])))
    (unseen,) = model.logps(["a b"], without=Bigrams(["a b", "a c"]))
    assert unseen == pytest.approx(np.log(0.25 * 1 / 4))
    assert model.logps([""], without=Bigrams([])) == [-np.inf]


def test_equals_are_not_torn_apart() -> None:
    tasks = [Task(f"{i}.mp4", ("A dog runs.",), ("A dog runs.",) * 4, (-1.0,) * 4) for i in range(5)]
    judge = OfflineJudge()
    judge.prepare(tasks)
    totals = [v.total for t in tasks for v in verdicts(judge, t)]
    assert max(totals) - min(totals) < 1e-9


def test_identity_names_the_pool_and_nothing_is_random() -> None:
    tasks, _ = pool(20)
    first, again, other = OfflineJudge(), OfflineJudge(), OfflineJudge()
    first.prepare(tasks)
    again.prepare(tasks)
    other.prepare(tasks[:-1])
    assert first.identity == again.identity != other.identity
    assert [first.score(t) for t in tasks] == [again.score(t) for t in tasks]
    with pytest.raises(ValueError, match="not prepared"):
        other.score(tasks[-1])
    with pytest.raises(ValueError, match="at least one candidate"):
        other.prepare([])


def test_on_real_captions(real_data: Path) -> None:
    """DREAM-1k: events are the evidence, the reference with 0 to half of its words replaced are the candidates."""
    lines = (real_data / "captions" / "DREAM-1k.jsonl").read_text().splitlines()[:80]
    rows = [json.loads(line) for line in lines]
    texts = [row["messages"][1]["content"][0]["reference"] for row in rows]
    vocabulary = sorted({w for t in texts for w in t.split() if len(w) > 4})
    rng = random.Random(0)
    tasks, damage = [], []
    for row, text in zip(rows, texts):
        events, candidates, shares = row["extra_info"]["events"], [], [i / 10 for i in range(6)]
        rng.shuffle(shares)
        for share in shares:
            words = [rng.choice(vocabulary) if len(w) > 3 and rng.random() < share else w for w in text.split()]
            candidates.append(" ".join(words).rstrip(".") + ".")
        half = len(events) // 2 or 1
        evidence = tuple(" ".join(part) for part in (events[:half], events[half:]) if part)
        tasks.append(Task(str(row["vid"]), evidence, tuple(candidates), (-1.0,) * 6))
        damage.append([-s for s in shares])
    judge = OfflineJudge()
    judge.prepare(tasks)
    totals = [[v.total for v in verdicts(judge, t)] for t in tasks]
    assert np.mean([spearman(a, b) for a, b in zip(totals, damage)]) > 0.85
    assert np.mean([max(t) - min(t) >= 4 for t in totals]) > 0.8
