"""The trained-head benchmark: its corpus, its model's training and resuming, its figures, end to end on a tiny corpus."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import small_lm, trained_head

pytest.importorskip("tokenizers")
SENTENCE = "a small red large blue circle square moves left right then stops and turns around slowly"
WORDS = SENTENCE.split()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """captions/*.json and *.jsonl of random sentences, tokenizers/tiny.json of their words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    generator = torch.Generator().manual_seed(0)

    def sentence() -> str:
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (9,), generator=generator))

    (tmp_path / "captions").mkdir()
    lines = [
        {"id": i, "text": {"long": sentence(), "short": "a circle"}, "same": "describe the video in detail"}
        for i in range(200)
    ]
    (tmp_path / "captions" / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "captions" / "b.json").write_text(
        json.dumps([{"captions": [sentence(), sentence()]} for _ in range(30)])
    )
    vocabulary = {word: i for i, word in enumerate([*WORDS, "describe", "the", "video", "in", "detail"])}
    vocabulary |= {f"unused{i}": len(vocabulary) + i for i in range(300)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "tokenizers").mkdir()
    tokenizer.save(str(tmp_path / "tokenizers" / "tiny.json"))
    return tmp_path


def test_corpus(data: Path) -> None:
    texts = list(trained_head.records(data / "captions"))
    assert len(texts) == 230 and len(texts[0]) == 2 and len(texts[-1]) == 2  # "a circle" is no caption
    train, held_out, vocab = trained_head.corpus(data / "captions", data / "tokenizers" / "tiny.json")
    assert vocab == len(WORDS) + 5 + 300
    assert len(held_out) == 10 * 20 + 6 + 2 * 10 * 3  # nine words and an end; the sentence that repeats, once
    assert len(train) == 10 * 180 + 2 * 10 * 27


def test_training_goes_on_where_it_stopped(data: Path) -> None:
    train, _, vocab = trained_head.corpus(data / "captions", data / "tokenizers" / "tiny.json")
    path, size = data / "lm.safetensors", small_lm.Size(vocab, 24, 1, 2)
    torch.manual_seed(0)
    before = small_lm.SmallLM(size)
    first = small_lm.train(train, size, path, seconds=0.5)
    _, facts = small_lm.load(path)
    assert float(facts["seconds"]) >= 0.5 and not list(data.glob("*.part"))
    again = small_lm.train(train, size, path, seconds=0.5)  # nothing left to do
    assert torch.equal(first.head, again.head) and not torch.equal(first.head, before.head)
    small_lm.train(train, size, path, seconds=1.0)
    assert int(small_lm.load(path)[1]["steps"]) > int(facts["steps"])
    with pytest.raises(ValueError, match="choose another output folder"):
        small_lm.train(train, small_lm.Size(vocab, 32, 1, 2), path, seconds=0.5)


def test_sampled_loss_is_the_full_one_where_everything_is_sampled(monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(40, 8, generator=generator), torch.randn(100, 8, generator=generator)
    labels = torch.randint(100, (40,), generator=generator)
    full = torch.nn.functional.cross_entropy(hidden @ head.T, labels)
    torch.testing.assert_close(small_lm.sampled_loss(hidden, head, labels, generator), full)
    monkeypatch.setattr(small_lm, "NEGATIVES", 30)
    sampled = [small_lm.sampled_loss(hidden, head, labels, generator) for _ in range(400)]
    assert abs(torch.stack(sampled).mean() - full) < 0.1 * full  # the logarithm of an estimate is a little low


def test_tiles() -> None:
    residual = torch.zeros(8, 16)
    residual[0, 0], residual[5, 9] = 0.5, 1e-3
    assert trained_head.tile_share(residual, (4, 4), tolerance=None) == 2 / 8
    assert trained_head.tile_share(residual, (4, 4), tolerance=1e-2) == 1 / 8
    assert trained_head.tile_share(residual, (4, 6), tolerance=1e-4) == 2 / 6  # the last tile is ragged


def test_end_to_end(data: Path, tmp_path: Path, capsys) -> None:
    options = ["--data", f"{data}/captions", "--work", f"{tmp_path}/work", "--minutes", "0.02", "--hidden", "24"]
    code = trained_head.main(
        [*options, "--rows", "64", "--seconds", "0.2", "--device", "cpu", "--out", f"{tmp_path}/out"]
    )
    assert code == 0 and "stand-in" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["stand_in"] for row in rows] == [False, True, True]
    assert rows[2]["entropy"] == pytest.approx(1.2, rel=0.01)
    for row in rows:
        for found in row["tolerances"]:
            assert 0 < found["kept"] <= 1 and found["ms"] > 0 and found["worst_row_over_bound"] <= 1
            assert found["error"] <= found["bound"] + 2e-6 and found["bound"] < 8 * found["tolerance"]


def test_absent_data_is_said(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(trained_head.measure, "ROOT", tmp_path / "checkout")
    assert trained_head.main([]) == 0
    assert "skipped: there are no captions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--data", "nowhere"], "no captions in nowhere"),
        (["--hidden", "32"], "--hidden in multiples of 6"),
        (["--rows", "63"], "--rows of at least 64"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_options_that_cannot_be_used(options: list[str], told: str, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        trained_head.main(options)
    assert told in capsys.readouterr().err


def test_what_a_model_had_is_what_is_reported_and_other_captions_are_another_model(data: Path, tmp_path: Path) -> None:
    """Else a model could be measured on captions that it was trained on."""
    options = ["--data", f"{data}/captions", "--work", f"{tmp_path}/work", "--hidden", "24", "--rows", "64"]
    options += ["--seconds", "0.1", "--device", "cpu", "--out", f"{tmp_path}/out"]
    told = []
    for minutes in ("0.03", "0.01"):
        assert trained_head.main([*options, "--minutes", minutes]) == 0
        told.append(json.loads((tmp_path / "out.json").read_text())["machine"]["model"])
    assert told[0] == told[1] and "steps of 1024 tokens" in told[0]
    assert len(list((tmp_path / "work").iterdir())) == 1
    (data / "captions" / "c.json").write_text(json.dumps([[f"caption {i} of a circle"] for i in range(20)]))
    assert trained_head.main([*options, "--minutes", "0.01"]) == 0
    assert len(list((tmp_path / "work").iterdir())) == 2


def test_the_tail_is_no_difference_of_large_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    x, head = torch.randn(64, 8, generator=generator), torch.randn(1500, 8, generator=generator)
    labels = torch.randint(1500, (64,), generator=generator)
    found = trained_head.problem(x, head, labels, 4.0, 0.1, "chunked")
    p = (4 * x.double() @ head.double().T).softmax(-1).sort(descending=True).values
    assert found["tail_beyond_1000_median"] == pytest.approx(p[:, 1000:].sum(1).median().item(), rel=1e-3)
