"""`synpo eval --pairs`: likelihoods of held-out answers, and greedy answers, of text models and of video models."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from synpo.cli import main
from synpo.config import Config, ConfigError, EvalConfig, ModelConfig, SamplingConfig
from synpo.demo.render import render
from synpo.demo.world import make_split
from synpo.evaluate import answers as module
from synpo.evaluate.answers import Answered, evaluate_pairs, pair_scores
from synpo.model.adapter import load
from synpo.model.tiny import byte_tokenizer, save, tiny_text_model
from synpo.records import Pair, read_records, write_records

GREEDY = SamplingConfig(temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=6)
PAIRS = [Pair(f"{i}", None, f"The sky {i // 2} is", f" blue {i}.", f" green cheese, {i} of it") for i in range(6)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two text models, one without a chat template."""
    found = {}
    for seed, name in enumerate(("chat", "base")):
        tokenizer = byte_tokenizer()
        if name == "base":
            tokenizer.chat_template = None
        torch.manual_seed(seed)
        found[name] = save(tiny_text_model(tokenizer), tokenizer, tmp_path_factory.mktemp("models") / name)
    return found


def settings(model: Path, **given: Any) -> Config:
    return Config(
        model=ModelConfig(path=str(model), device="cpu"),
        eval=EvalConfig(sampling=GREEDY, batch_size=4, bootstrap=50),
        **given,
    )


@pytest.mark.parametrize("name", ["chat", "base"])
def test_figures_are_those_of_full_logits(name: str, bases: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    pairs = tmp_path / "pairs.jsonl"
    write_records(pairs, [*PAIRS, Pair("same", None, "P", "x", " x")])
    output = tmp_path / "out"
    result = evaluate_pairs(settings(bases[name]), pairs, None, output)
    lm = load(ModelConfig(path=str(bases[name]), device="cpu"))
    margins = []
    for pair, row in zip(PAIRS, read_records(Answered, output / "answers.jsonl")):
        prompt = lm.prompt(pair.prompt).input_ids
        if name == "base":
            assert lm.tokenizer.decode(prompt) == pair.prompt
        for side in ("chosen", "rejected"):
            answer = lm.completion(getattr(pair, side), pair.prompt)
            with torch.no_grad():
                logps = lm.model(torch.cat([prompt, answer])[None]).logits[0].log_softmax(-1)
            own = logps[len(prompt) - 1 : -1].gather(1, answer[:, None])
            assert getattr(row, side) == pytest.approx(float(own.mean()), rel=1e-4)
            assert getattr(row, f"{side}_tokens") == len(answer)
        written = lm.model.generate(
            prompt[None],
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=list(lm.eos_token_ids),
            pad_token_id=lm.pad_token_id,
        )
        assert row.pair == pair.id and row.answer == lm.text(written[0, len(prompt) :])
        margins.append(row.chosen - row.rejected)
    told = json.loads((output / "scores.json").read_text())
    scores = told["systems"]["this model"]
    assert told["pairs"] == 6 and list(scores["per_pair"]) == [p.id for p in PAIRS]
    assert scores["scores"]["margin"] == pytest.approx(sum(margins) / 6)
    assert scores["scores"]["accuracy"] == pytest.approx(sum(m > 0 for m in margins) / 6)
    assert scores["intervals"]["margin"]["low"] <= scores["scores"]["margin"] <= scores["intervals"]["margin"]["high"]
    assert told["run"]["left_out"] == {"same": "chosen equals rejected: x"} and told["run"]["model_fingerprint"]
    shown = capsys.readouterr().out
    assert "left out pair same: chosen equals rejected" in shown and "Preference between answers" in shown
    page = (output / "report.html").read_text()
    assert "of 6 pairs: " in page and "cheese" in page and "The sky 0 is" in page
    assert result.main == "accuracy" and [t.title for t in result.to_tables()] == ["Preference between answers"]


def test_what_is_known_is_not_computed_again_and_prompts_are_answered_once(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, output = tmp_path / "pairs.jsonl", tmp_path / "out"
    asked: list[int] = []
    real = module.generate
    monkeypatch.setattr(
        module, "generate", lambda lm, prompts, *a, **k: asked.append(len(prompts)) or real(lm, prompts, *a, **k)
    )
    write_records(pairs, PAIRS[:3])
    evaluate_pairs(settings(bases["chat"]), pairs, None, output)
    assert asked == [2], "three pairs of two prompts"
    write_records(pairs, PAIRS)
    whole = evaluate_pairs(settings(bases["chat"]), pairs, None, output)
    assert asked == [2, 1], "the third pair's prompt is answered already"
    again = evaluate_pairs(settings(bases["chat"]), pairs, None, tmp_path / "again")
    for name, values in whole.scores["this model"].per_video.items():
        assert values == pytest.approx(again.scores["this model"].per_video[name], abs=1e-5)
    assert (output / "answers.jsonl").read_text().count("\n") == 6
    held = evaluate_pairs(settings(bases["chat"], train={"held_out": 2}), pairs, None, output)
    assert len(held.videos) == 2 and len(asked) == 4


def test_an_earlier_evaluation_is_the_baseline(bases: dict[str, Path], tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    write_records(pairs, PAIRS)
    evaluate_pairs(settings(bases["base"]), pairs, None, tmp_path / "first")
    earlier = tmp_path / "first" / "answers.jsonl"
    result = evaluate_pairs(settings(bases["chat"]), pairs, None, tmp_path / "second", {"base": earlier})
    assert result.systems == ["base", "this model"]
    difference = result.differences["this model", "base"]["margin"]
    assert difference is not None and difference.value != 0 and difference.low <= difference.value <= difference.high
    assert any("margin" in title for title in (c.title for c in result.to_charts()))
    page = (tmp_path / "second" / "report.html").read_text()
    assert "The margin grew in" in page or "It fell in" in page
    write_records(pairs, [*PAIRS, replace(PAIRS[0], id="new", prompt="Other?")])
    with pytest.raises(ValueError, match=r"--against base: it has nothing on 1 pair \('new'\)"):
        evaluate_pairs(settings(bases["chat"]), pairs, None, tmp_path / "second", {"base": earlier})
    with pytest.raises(ConfigError, match="--against base: .* is a folder; give the file"):
        evaluate_pairs(settings(bases["chat"]), pairs, None, tmp_path / "second", {"base": tmp_path})


def test_a_tie_counts_one_half_and_what_was_not_answered_is_said() -> None:
    rows = {str(i): Answered("", str(i), -1.0, -1.0 - 0.5 * (i - 1), 3, 4, None if i else "x") for i in range(3)}
    scores = pair_scores(rows)
    assert scores.per_video["accuracy"] == [0.0, 0.5, 1.0] and scores.corpus["margin"] == 0.0
    assert scores.notes == ["2 prompts too long to be answered in the model's context"]


def test_prompts_that_leave_no_room_for_an_answer_are_still_scored(bases: dict[str, Path], tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    write_records(pairs, PAIRS[:2])
    config = settings(bases["chat"])
    config = replace(config, eval=replace(config.eval, sampling=replace(GREEDY, max_new_tokens=100_000)))
    result = evaluate_pairs(config, pairs, None, tmp_path / "out")
    assert result.counts["this model"] == {"answered": 0} and len(result.scores["this model"].per_video["chosen"]) == 2


def test_pairs_about_videos(tiny_captioner_path: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    for scene in make_split(0, "held-out", 2):
        render(scene, folder)
    (folder / "noise.mp4").write_bytes(b"no video")
    names = ["held-out-00000.mp4", "held-out-00001.mp4", "noise.mp4", "gone.mp4"]
    rows = [
        Pair(f"{n}", name, "Describe the video.", "A red circle moves.", "It rains.") for n, name in enumerate(names)
    ]
    write_records(tmp_path / "pairs.jsonl", rows)
    config = settings(tiny_captioner_path)
    with pytest.raises(ConfigError, match=r"pair 0 has the video held-out-00000\.mp4; --videos should name the folder"):
        evaluate_pairs(config, tmp_path / "pairs.jsonl", None, tmp_path / "out")
    result = evaluate_pairs(config, tmp_path / "pairs.jsonl", folder, tmp_path / "out")
    assert result.videos == ["0", "1"]
    shown = capsys.readouterr().out
    assert "left out pair 2: video unreadable" in shown and "left out pair 3: video missing" in shown
    assert (tmp_path / "out" / "report.html").read_text().count("data:image/") == 2
    first, second = result.scores["this model"].per_video["chosen"]
    assert first != second, "the same words about other videos"


def test_what_eval_needs_is_said(bases: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").touch()
    common = ["eval", "--model", str(bases["chat"]), "--output", str(tmp_path / "out"), "--device", "cpu"]
    for flags, message in (
        ([], "give --videos DIR .* or --pairs FILE"),
        (["--pairs", "x", "--references", "y"], "give one of the two"),
        (["--videos", str(tmp_path / "videos")], "takes no video, .* with --pairs"),
        (["--pairs", str(tmp_path / "none.jsonl")], "does not exist"),
    ):
        assert main([*common, *flags]) == 2
        assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
    write_records(tmp_path / "pairs.jsonl", PAIRS[:2])
    tokens = ["--set", "eval.sampling.max_new_tokens=4"]
    assert main([*common, "--pairs", str(tmp_path / "pairs.jsonl"), *tokens]) == 0
    assert "Preference between answers" in capsys.readouterr().out
