"""What a report says of an evaluation: sentences, figures set large, and which captions it shows."""

import pytest

from synpo.evaluate.run import EvalResult, FactSheet, evaluate
from synpo.evaluate.show import findings, groups, highlights, words

REFERENCES = {f"v{i}": [f"a red ball rolls past {i} dogs"] for i in range(20)}
FACTS = FactSheet(
    true={video: {"red", "ball"} for video in REFERENCES},
    parse=lambda caption: {word for word in caption.split() if word in {"red", "blue", "ball", "box"}},
)
RIGHT, HALF, WRONG = "a red ball", "a red box", "a blue box"
CAPTIONS = {
    "base": dict.fromkeys(REFERENCES, HALF),
    "DPO": dict.fromkeys(REFERENCES, HALF),
    "SynPO": {v: RIGHT if i < 12 else WRONG if i < 15 else HALF for i, v in enumerate(REFERENCES)},
}


def scored(*systems: str) -> EvalResult:
    return evaluate({s: CAPTIONS[s] for s in systems}, REFERENCES, FACTS, meteor=False, progress=False)


def test_findings_are_about_the_last_system() -> None:
    said = findings(scored("base", "DPO", "SynPO"))
    assert [sentence.split(":")[0] for sentence in said] == ["SynPO against base", "SynPO against DPO"]
    assert all(sentence.endswith(", better.") and "fact F1 +22.5 (" in sentence for sentence in said)
    assert findings(scored("SynPO", "DPO"))[0].endswith(", worse.")
    assert findings(scored("base", "DPO"))[0].endswith("these videos do not tell them apart.")
    assert findings(scored("base")) == []


def test_large_figures() -> None:
    tiles = highlights(scored("base", "SynPO"))
    assert [(tile.system, tile.value) for tile in tiles] == [("base", "50.0"), ("SynPO", "72.5")]
    assert tiles[0].remark == "fact F1 · 50.0 to 50.0"


def test_what_changed_most_is_shown_both_ways_and_counted() -> None:
    better, worse, same = groups(scored("base", "DPO", "SynPO"), CAPTIONS, REFERENCES, lambda video: None)
    assert better.title == "Better with SynPO" and better.note.startswith(
        "12 of 20 videos gained in fact F1 over base;"
    )
    assert worse.title == "Worse with SynPO" and worse.note.startswith("3 of 20 videos lost in fact F1 over base;")
    assert [sample.video for sample in better.samples] == ["v0", "v1", "v2", "v3"]
    assert [sample.video for sample in worse.samples] == ["v14", "v13", "v12"]
    assert same.note == "5 of 20 videos have the same fact F1." and [sample.video for sample in same.samples] == [
        "v15",
        "v16",
    ]
    sample = better.samples[0]
    assert sample.captions == {"base": HALF, "DPO": HALF, "SynPO": RIGHT}
    assert sample.scores == {"base": "fact F1 50", "DPO": "fact F1 50", "SynPO": "fact F1 100"}


@pytest.mark.parametrize(("videos", "shown"), [(20, (4, 4)), (3, (2, 1)), (1, (1,))])
def test_of_a_single_system_the_best_and_the_worst_are_shown(videos: int, shown: tuple[int, ...]) -> None:
    references = {v: REFERENCES[v] for v in list(REFERENCES)[:videos]}
    captions = {"SynPO": {v: CAPTIONS["SynPO"][v] for v in references}}
    result = evaluate(captions, references, FACTS, meteor=False, progress=False)
    found = groups(result, captions, references, lambda video: None)
    assert [len(group.samples) for group in found] == list(shown)
    names = [sample.video for group in found for sample in group.samples]
    assert len(set(names)) == len(names)


def test_words_are_explained_where_they_occur() -> None:
    assert [word for word, _ in words(scored("base"))] == ["fact F1", "CIDEr", "BLEU-4", "ROUGE-L", "ranges"]
    plain = evaluate({"base": CAPTIONS["base"]}, REFERENCES, meteor=False, progress=False)
    assert [word for word, _ in words(plain)] == ["CIDEr", "BLEU-4", "ROUGE-L", "ranges"]
