"""From captions of several systems to one result: figures, tables, JSON; and the caption file it is read from."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from synpo.evaluate.run import CAPTIONS, EvalResult, FactSheet, evaluate, read_captions
from synpo.report.table import Table, print_table

COLOURS = ["red", "blue", "green", "yellow"]
REFERENCES = {f"v{i}": [f"a {COLOURS[i % 4]} ball rolls past {i} dogs"] for i in range(24)}
FACTS = FactSheet(
    true={video: {COLOURS[i % 4], "ball"} for i, video in enumerate(REFERENCES)},
    parse=lambda caption: {word for word in caption.split() if word in {*COLOURS, "ball", "box"}},
)


def captions(right: int) -> dict[str, str]:
    """The reference for the first `right` videos, something false for the others."""
    return {v: refs[0] if i < right else "a red box" for i, (v, refs) in enumerate(REFERENCES.items())}


@pytest.fixture(scope="module")
def result() -> EvalResult:
    systems = {"base": captions(6), "worse": captions(0), "better": captions(20)}
    return evaluate(systems, REFERENCES, FACTS, meteor=False, progress=False)


def test_scores_intervals_and_differences(result: EvalResult) -> None:
    assert result.systems == ["base", "worse", "better"]
    assert result.baseline == "base"
    f1 = {system: result.scores[system].corpus["fact F1"] for system in result.systems}
    assert f1["worse"] < f1["base"] < f1["better"]
    assert result.counts["base"] == {"empty_captions": 0, "facts_stated": 48, "facts_true": 48, "facts_right": 16}
    assert list(result.differences) == [("worse", "base"), ("better", "base"), ("better", "worse")]
    gain, loss = (result.differences[system, "base"]["CIDEr"] for system in ("better", "worse"))
    assert gain is not None and loss is not None
    assert gain.low > 0 > loss.high
    cider = {system: scores.corpus["CIDEr"] for system, scores in result.scores.items()}
    assert gain.value == pytest.approx(cider["better"] - cider["base"])
    rival = result.differences["better", "worse"]["CIDEr"]
    assert rival is not None and rival.low > 0
    assert rival.value == pytest.approx(cider["better"] - cider["worse"])
    again = evaluate({"base": captions(6)}, REFERENCES, FACTS, meteor=False, progress=False)
    assert again.intervals["base"] == result.intervals["base"]


def test_json_holds_every_figure(result: EvalResult) -> None:
    told = json.loads(json.dumps(result.to_json(), allow_nan=False))
    better = told["systems"]["better"]
    assert told["videos"] == 24
    assert better["scores"] == result.scores["better"].corpus
    assert set(better["scores"]) == {
        *("CIDEr", "ROUGE-L", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4"),
        *(f"fact {macro}{name}" for macro in ("", "macro ") for name in ("precision", "recall", "F1")),
    }
    assert better["intervals"]["CIDEr"]["low"] < better["scores"]["CIDEr"] < better["intervals"]["CIDEr"]["high"]
    assert {other: found["CIDEr"]["better"] for other, found in better["minus"].items()} == {"base": 1.0, "worse": 1.0}
    assert better["per_video"]["v0"]["fact F1"] == 1.0
    assert told["systems"]["base"]["minus"] == {}


def test_tables(result: EvalResult) -> None:
    table = result.to_table()
    assert table.header == ["system", "fact F1", "fact precision", "fact recall", "CIDEr", "BLEU-4", "ROUGE-L"]
    assert [row[0] for row in table.rows] == ["base", "worse", "better"]
    interval = result.intervals["better"]["fact F1"]
    assert interval is not None
    value = result.scores["better"].corpus["fact F1"]
    assert table.rows[2][1] == f"{100 * value:.1f}\n{100 * interval.low:.1f}–{100 * interval.high:.1f}"
    assert table.best == {(2, column) for column in range(1, 7)}
    assert "METEOR: not computed (turned off)" in table.notes
    difference = result.to_difference_table()
    assert difference is not None
    assert [row[0] for row in difference.rows] == ["worse − base", "better − base", "better − worse"]
    assert {(1, 1), (1, 4), (2, 1), (2, 4)} <= difference.good
    assert {(0, 1), (0, 4)} <= difference.bad
    assert difference.rows[1][1].startswith("+") and difference.rows[0][1].startswith("-")


def test_charts_of_what_tells_most(result: EvalResult) -> None:
    charts = {chart.title: chart for chart in result.to_charts()}
    assert list(charts) == ["fact F1, difference", "fact F1", "CIDEr"]
    assert [chart.zero for chart in charts.values()] == [True, False, False]
    assert [name for name, _, _ in charts["fact F1, difference"].rows][-1] == "better − worse"


def test_a_printed_table_fits_a_terminal_and_loses_nothing(result: EvalResult) -> None:
    stream = io.StringIO()
    table = result.to_table()
    print_table(table, Console(file=stream, width=80))
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    for row in table.rows:
        for cell in row:
            assert all(line in text for line in cell.split("\n"))


def test_print_table_takes_captions_as_text_not_as_markup() -> None:
    stream = io.StringIO()
    print_table(Table("[bold]t", ["[red]x"], [["[/nothing] a [b]"]], notes=["[i]n"]), Console(file=stream, width=80))
    assert all(text in stream.getvalue() for text in ("[bold]t", "[red]x", "[/nothing] a [b]", "[i]n"))


def test_table_of_uneven_rows() -> None:
    with pytest.raises(ValueError, match="row 1 of table 't' has 1 cells, its header 2"):
        Table("t", ["a", "b"], [["1", "2"], ["3"]])


def test_notes_name_the_system_they_are_about() -> None:
    systems = {"one": captions(24), "other": {**captions(24), "v3": ""}}
    table = evaluate(systems, REFERENCES, meteor=False, progress=False).to_table()
    assert "other: 1 empty caption, scored 0 ('v3')" in table.notes


def test_changes_from_the_largest_gain_to_the_largest_loss(result: EvalResult) -> None:
    changes = result.changes("better")
    assert sorted(video for video, _ in changes) == sorted(REFERENCES)
    gains = [gain for _, gain in changes]
    assert gains == sorted(gains, reverse=True)
    f1 = {system: dict(zip(REFERENCES, result.scores[system].per_video["fact F1"])) for system in result.systems}
    assert all(gain == f1["better"][video] - f1["base"][video] for video, gain in changes)
    assert [gain for _, gain in result.changes("worse")] == sorted(gain for _, gain in result.changes("worse"))[::-1]


def test_one_system_has_no_difference_table_and_one_chart_a_metric() -> None:
    alone = evaluate({"base": captions(3)}, REFERENCES, meteor=False, progress=False)
    assert alone.to_difference_table() is None
    assert [chart.title for chart in alone.to_charts()] == ["CIDEr"]
    assert alone.to_table().best == set()


def test_a_single_video_has_neither_intervals_nor_differences() -> None:
    one = {"v0": REFERENCES["v0"]}
    alone = evaluate({"a": captions(1), "b": captions(2)}, one, meteor=False, progress=False)
    assert alone.to_difference_table() is None
    assert alone.to_table().notes[0] == "×100; 1 video"


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="no system to evaluate"):
        evaluate({}, REFERENCES)
    with pytest.raises(ValueError, match=r"^base: no candidate caption for 1 of 24 videos \('v0'\)"):
        evaluate({"base": dict.fromkeys(list(REFERENCES)[1:], "x")}, REFERENCES, meteor=False, progress=False)
    few = FactSheet(true={"v0": {"red"}}, parse=FACTS.parse)
    with pytest.raises(ValueError, match=r"no true facts for 23 of 24 videos \('v1', 'v2', 'v3', ...\)"):
        evaluate({"base": captions(1)}, REFERENCES, few, meteor=False, progress=False)


def test_read_captions(tmp_path: Path) -> None:
    path = tmp_path / "captions.jsonl"
    path.write_text('{"video": "a", "caption": "x", "seed": 1}\n{"video": "b", "caption": ""}\n{"video": "c", "capt')
    assert read_captions(path) == {"a": "x", "b": ""}
    with pytest.raises(ValueError, match=r"captions.jsonl: no caption of 1 video \('c'\); run the captioning again"):
        read_captions(path, ["a", "c"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"video": "a", "caption": "x"}\n{"video": "a", "caption": "y"}\n', "jsonl:2: a second caption of 'a'"),
        ('{"video": "a"}\n', "jsonl:1: expected .* got keys video"),
        ('{"video": "a", "caption": null}\n', "jsonl:1: expected"),
        ("[1]\n", "jsonl:1: expected .* got list"),
        ("nonsense\n", "jsonl:1: not JSON"),
    ],
)
def test_bad_caption_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_captions(tmp_path / "c.jsonl")


def test_nothing_is_not_less_than_nothing() -> None:
    assert [CAPTIONS.figure("CIDEr", value, "+") for value in (-0.0001, 0.0, -0.01)] == ["+0.0", "+0.0", "-1.0"]
