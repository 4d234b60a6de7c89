"""Text that is none, wherever it enters or leaves: half a surrogate pair, NUL, codes that a terminal obeys."""

import io
import json
import os
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from synpo import terminal
from synpo.cli import main
from synpo.config import Config, ConfigError, load_config
from synpo.data.pairs import load_pairs
from synpo.data.tokenize import PairDataset, PairEncoder
from synpo.evaluate.benchmarks import read_references
from synpo.evaluate.metrics import caption_metrics
from synpo.evaluate.run import read_captions
from synpo.model.adapter import CaptionModel
from synpo.model.tiny import byte_tokenizer, tiny_text_model
from synpo.pipeline.judge.base import Task
from synpo.pipeline.judge.cache import ReplyCache
from synpo.pipeline.judge.chat import InvalidAnswer, orders_of, question, read_answer
from synpo.records import Caption, Pair, RecordError, RecordStore, read_jsonl, record_id, write_json, write_jsonl
from synpo.report.page import Group, Report, write_report
from synpo.report.parts import Sample
from synpo.report.table import Table, print_table
from synpo.text import clean, cleaned, printable

HALF = "nice \ud83d"
MENDED = "nice \ufffd"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("grün 😀 \ufeff\uffff", "grün 😀 \ufeff\uffff"),
        (HALF, MENDED),
        ("\udcff.mp4", "\ufffd.mp4"),
        ("\ud83d\ude00", "😀"),
        ("\ude00\ud83d!", "\ufffd\ufffd!"),
        ("\ud83d\ud83d\ude00x", "\ufffd😀x"),
        ("\ufeffa\0b", "\ufeffa\ufffdb"),
    ],
)
def test_what_is_no_text_is_replaced_and_halves_are_joined(text: str, expected: str) -> None:
    assert clean(text) == expected
    assert cleaned({text: [text, (text, 1)], "n": None}) == {expected: [expected, [expected, 1]], "n": None}
    expected.encode()


def row_of(kind: str, text: dict[str, str]) -> dict[str, Any]:
    """A row of each format that the loader takes, its texts as given."""
    user, good, bad = (
        {"role": role, "content": text[name]}
        for role, name in (("user", "prompt"), ("assistant", "chosen"), ("assistant", "rejected"))
    )
    parts = {"role": "user", "content": [{"type": "text", "text": text["prompt"]}]}
    plain = {name: text[name] for name in ("prompt", "chosen", "rejected")}
    return {
        "record": {"id": text["id"], "video": text["video"], **plain},
        "plain": {**plain, "video": text["video"]},
        "conversational": {"prompt": [user], "chosen": [good], "rejected": [bad], "video": text["video"]},
        "parts": {"prompt": [parts], "chosen": [good], "rejected": [bad]},
        "implicit": {"chosen": [user, good], "rejected": [user, bad]},
        "said twice": {"prompt": text["prompt"], "chosen": [user, good], "rejected": [user, bad]},
        "authors": {
            "video_name": text["video"], "pos_pre": text["chosen"], "neg_pre": text["rejected"], "pos_score": 9, "neg_score": 1,
        },
    }[kind]  # fmt: skip


@pytest.mark.parametrize("wrong", [HALF, "a\0b", "\udcff"])
@pytest.mark.parametrize("kind", ["record", "plain", "conversational", "parts", "implicit", "said twice", "authors"])
def test_pairs_of_every_format_hold_text(kind: str, wrong: str, tmp_path: Path, capsys: Any) -> None:
    fine = {"id": "a", "video": "a.mp4", "prompt": "P?", "chosen": "good", "rejected": "bad"}
    path = tmp_path / "pairs.jsonl"
    for name in fine:
        path.write_text("".join(json.dumps(row_of(kind, t)) + "\n" for t in (fine, fine | {name: wrong})))
        pair = load_pairs(path)[1]
        said = capsys.readouterr().err
        held = {value for value in vars(pair).values() if isinstance(value, str)}
        assert all(clean(text) == text for text in held)
        if clean(wrong) in held:
            assert f"{path}:2: half of a surrogate pair, or NUL, is no text" in said
        else:  # a format that has no such column
            assert not said and name in ("id", "video", "prompt")
    lm = CaptionModel(tiny_text_model(tokenizer := byte_tokenizer()), tokenizer, None)
    path.write_text(json.dumps(row_of(kind, fine | {"chosen": wrong})) + "\n")
    pair = load_pairs(path)[0]
    encoded = PairEncoder(lm).encode(Pair(pair.id, None, pair.prompt, pair.chosen, pair.rejected))
    assert lm.text(encoded.chosen) == clean(wrong)


def test_lines_that_are_no_text_are_counted(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": "\xed\xa0\xbd"}\n{"a": "fine"}\n{"\\udcff": 1}\n{"a": "\\ud83d\\ude00", "b": NaN}\n')
    rows = [row for _, row in read_jsonl(path)]
    assert rows[:3] == [{"a": "\ufffd"}, {"a": "fine"}, {"\ufffd": 1}] and rows[3]["a"] == "😀"
    assert capsys.readouterr().err.startswith(f"warning: {path}:1 and 1 more: half of a surrogate pair, or NUL")


def test_what_is_written_is_text_and_what_a_store_holds_is_what_it_wrote(tmp_path: Path) -> None:
    made = Caption("1", "b\udcff.mp4", None, 0, HALF, "a\0b", -0.5)
    store = RecordStore(Caption, tmp_path / "captions.jsonl")
    store.append(made)
    again = RecordStore(Caption, tmp_path / "captions.jsonl")["1"]
    assert store["1"] == again == made and (made.video, made.text, made.draft) == ("b\ufffd.mp4", MENDED, "a\ufffdb")
    write_json(tmp_path / "one.json", {HALF: [HALF]})
    write_jsonl(tmp_path / "rows.jsonl", [{"video": HALF}])
    assert json.loads((tmp_path / "one.json").read_bytes().decode()) == {MENDED: [MENDED]}
    assert json.loads((tmp_path / "rows.jsonl").read_bytes().decode()) == {"video": MENDED}
    assert record_id(HALF) == record_id(MENDED) != record_id("nice")


REFERENCES = {
    "VATEX": [{"videoID": HALF, "enCap": [HALF]}],
    "MSR-VTT": {"videos": [{"video_id": HALF}], "sentences": [{"video_id": HALF, "caption": HALF}]},
    "captions": {"video": HALF, "captions": [HALF]},
    "DREAM-1k": {
        "messages": [{"content": [{"video": {"video_file": HALF}}]}, {"content": [{"reference": HALF}]}], "idx": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", REFERENCES)
def test_references_and_captions_are_text(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text(json.dumps(REFERENCES[kind]))
    found = read_references(path)
    assert (found.format, found.captions) == (kind, {MENDED: [MENDED]})
    path.write_text(json.dumps({"video": HALF, "caption": HALF}) + "\n")
    assert read_captions(path) == {MENDED: MENDED}
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"file:1: not JSON|a file without a complete line"):
        read_references(path)


@pytest.mark.parametrize("deep", [101, 300, 600, 900, 5000, 100_000])
def test_json_without_end_ends_nothing(deep: int, tmp_path: Path) -> None:
    """From some hundreds on, Python cannot walk through what its own reader of JSON still takes."""
    nested, path = "[" * deep + "]" * deep, tmp_path / "file"
    path.write_text(f'{{"prompt": "P?", "chosen": "a", "rejected": "b", "more": {nested}}}\n')
    with pytest.raises(RecordError, match=r"file:1: not JSON \((nested more than 100 deep|maximum recursion depth)"):
        load_pairs(path)
    path.write_text(f'{{"video": "a.mp4", "caption": {nested}}}\n')
    with pytest.raises(RecordError, match="file:1: not JSON"):
        read_captions(path)
    for text in (nested, f'{{"videos": [], "sentences": {nested}}}', f'{{"video": "a", "captions": {nested}}}\n'):
        path.write_text(text + "\n")
        with pytest.raises(ValueError, match="file"):
            read_references(path)
    path.write_text(f"train: {{a: {nested}}}")
    with pytest.raises(ConfigError, match=r"c\.yaml|config file|is not YAML|nested"):
        load_config(path)
    with pytest.raises(ConfigError, match="--set train"):
        load_config(overrides=[f"train.a={nested}"])
    for reply in (f'{{"scores": {nested}}}', '{"a":' * deep + "1" + "}" * deep, "{" * deep):
        with pytest.raises(InvalidAnswer):
            read_answer(reply, 1)
    fine = '{"scores": [{"id": 1, "factuality": 1, "fluency": 1, "consistency": 1}]}'
    assert len(read_answer(f'{{"a": {nested}}} {fine}', 1)) == 1


def test_a_key_that_is_there_twice_has_no_meaning(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text('{"prompt": "P?", "chosen": "a", "rejected": "b", "chosen": "c"}\n')
    with pytest.raises(RecordError, match=r"file:1: not JSON \(the key 'chosen' is there twice\)"):
        load_pairs(path)
    for end in ("", "\n"):
        path.write_text('{"video": "a", "captions": ["x"], "captions": ["y"]}' + end)
        with pytest.raises(ValueError, match="the key 'captions' is there twice"):
            read_references(path)
    scores = '"scores": [{"id": 1, "factuality": 1, "fluency": 1, "consistency": 1}]'
    with pytest.raises(InvalidAnswer):
        read_answer(f"{{{scores}, {scores}}}", 1)
    with pytest.raises(InvalidAnswer):
        read_answer(f"{{{scores.replace('1}', '1, {chr(34)}fluency{chr(34)}: 5}')}}}", 1)


def test_scores_of_captions_that_are_no_text() -> None:
    """Half an emoji counts for as much as a whole one: nothing."""
    references = {"a": ["a red circle moves " + HALF], "b": ["a blue\nsquare ||| stops"]}
    odd = caption_metrics(
        {"a": "a red \ud83d circle \0 moves", "b": "a blue ||| square\r\nstops"}, references, meteor=False
    )
    plain = caption_metrics(
        {"a": "a red circle moves", "b": "a blue | | | square stops"},
        {"a": ["a red circle moves nice"], "b": ["a blue square | | | stops"]},
        meteor=False,
    )
    assert odd.corpus == plain.corpus and odd.per_video == plain.per_video


def test_a_judge_is_asked_and_answered_in_text(tmp_path: Path) -> None:
    task = Task("b\udcff.mp4", (HALF,), ("a\ud83d", "b\0"), (0.0, 0.0))
    for message in question(task, orders_of(task, 1, 0)[0]):
        message["content"].encode()
    scores = [{"id": i, "factuality": 1, "fluency": 1, "consistency": 1} for i in (1, 2)]
    assert len(read_answer("Fine \ud83d. " + json.dumps({"scores": scores}), 2)) == 2
    with pytest.raises(InvalidAnswer) as caught:
        read_answer(json.dumps({"scores": scores, "\ud83d": 1}), 2)
    str(caught.value).encode()
    cache = ReplyCache(tmp_path / "cache.sqlite")
    key = cache.key(messages=[{"content": HALF}])
    cache.put(key, HALF)
    assert cache.get(key) == MENDED
    with sqlite3.connect(tmp_path / "cache.sqlite") as db:
        assert db.execute("SELECT reply FROM replies").fetchone() == (MENDED,)


def test_settings_are_text(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(r'pairs: {prompt: "nice \ud83d"}' + "\n" + r'model: {template_variables: {"\ud83d\ude00": "a\0"}}')
    config = load_config(path, [r'eval.prompt="😀 \ud83d\ude00 \udcff"'], {"judge": {"model": HALF}})
    assert (config.pairs.prompt, config.eval.prompt, config.judge.model) == (MENDED, "😀 😀 \ufffd", MENDED)
    assert config.model.template_variables == {"😀": "a\ufffd"}
    with pytest.raises(ConfigError, match="is not YAML"):
        load_config(overrides=[os.fsdecode(b"pairs.prompt=\xff")])
    assert Config() == load_config()


def test_a_report_is_text(tmp_path: Path) -> None:
    table = Table(HALF, ["system", HALF], [[HALF, "1"]], notes=[HALF])
    shown = [Group(HALF, HALF, [Sample(HALF, [HALF], {HALF: HALF})])]
    report = Report(HALF, HALF, tables=[table], captions=shown, run={HALF: HALF}, figures={HALF: "a\0"})
    write_report(tmp_path / "report.html", report)
    page = (tmp_path / "report.html").read_bytes().decode()
    assert page.count("\ufffd") > 8
    assert json.loads(page.partition('id="figures">')[2].partition("</script>")[0]) == {MENDED: "a\ufffd"}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_tables_and_messages_print_on_any_terminal(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, errors="strict"))
    tokenizer = byte_tokenizer()
    lm = CaptionModel(tiny_text_model(tokenizer), tokenizer, None)
    same = Pair("[/b] 😀", None, "P?", "[/INST] same :smile: \x1b[31m", "[/INST] same :smile: \x1b[31m")
    dataset = PairDataset(PairEncoder(lm), [same, Pair("1", None, "P?", "a", "b")], progress=False)
    console = terminal.console()
    console.print(f"left out [/b] κ {HALF}")
    console.print(dataset.table())
    print_table(Table("κ × …", ["a", "b"], [["[/b] \udcff\x1b[2J", "1\n2"]], notes=["–"]))
    print_table(Table("κ", ["a"], [["😀"]]), Console(file=sys.stdout))
    sys.stdout.flush()
    shown = raw.getvalue().decode(encoding)
    assert "[/INST] same :smile:" in shown and "left out [/b]" in shown and "\x1b" not in shown
    assert ("κ" in shown) == (encoding == "utf-8")
    assert printable("a\tb\n\x1b[0m\x9b") == "a\tb\n\ufffd[0m\ufffd"


def test_the_command_line_on_a_terminal_of_ascii(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict"))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, encoding="ascii", errors="strict", write_through=True))
    name = os.fsdecode("größer \x1b[31m".encode() + b"\xff")
    assert main(["eval", "--model", "x", "--videos", name, "--output", str(tmp_path)]) == 2
    assert (
        raw.getvalue().startswith(b"synpo eval: gr")
        and b"is not a folder" in raw.getvalue()
        and b"\x1b" not in raw.getvalue()
    )
