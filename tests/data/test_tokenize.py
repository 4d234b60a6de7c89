"""Encoding pairs: nothing is cut, every pair that cannot be used is dropped with its reason, decoding is cached."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers.processors import TemplateProcessing

from made_videos import write_latin, write_unfinished
from synpo.config import ConfigError
from synpo.data import tokenize
from synpo.data.features import VisionCache
from synpo.data.tokenize import PairDataset, PairEncoder, PairError
from synpo.model.adapter import CaptionModel
from synpo.model.tiny import byte_tokenizer, tiny_text_model
from synpo.records import Pair
from synpo.video import FrameSampling, probe

SAMPLING = FrameSampling(fps=1.0, minimum=2, maximum=4)  # 3 s of video: 3 frames, 3 × 4 + 1 visual tokens


def pair(name: str, video: str | None = "a.mp4", chosen: str = "A bar moves.", rejected: str = "It rains.") -> Pair:
    return Pair(name, video, "Describe.", chosen, rejected)


def test_a_pair_is_encoded_whole(captioner: CaptionModel, videos: Path) -> None:
    encoded = PairEncoder(captioner, videos, SAMPLING).encode(pair("p", "b/c.mp4"))
    token = captioner.model.config.video_token_id
    assert int((encoded.prompt == token).sum()) == 13
    assert encoded.vision["pixels"].shape == (3, 3, 48, 48)
    for ids, text in ((encoded.chosen, "A bar moves."), (encoded.rejected, "It rains.")):
        assert ids[-1] == captioner.tokenizer.eos_token_id
        assert captioner.text(ids) == text


@pytest.mark.parametrize("tells_time", [True, False])
def test_what_is_counted_is_what_is_read(
    tells_time: bool, captioner: CaptionModel, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without pixels too, where the model writes the time between the frames: two videos are as long as they are."""
    prepare, prepared = captioner.vision.prepare, []  # type: ignore[union-attr]

    def telling(text: str, frames: Any, vision: Any = None, seconds: float | None = None) -> Any:
        prepared.append(seconds)
        return prepare(f"{text} {seconds:.1f} s" if tells_time else text, frames, vision, seconds)

    monkeypatch.setattr(captioner.vision, "prepare", telling)
    encoder = PairEncoder(captioner, videos, SAMPLING)
    monkeypatch.setattr(
        tokenize, "probe", lambda path: replace(probe(path), duration=3.0 if path.name == "a.mp4" else 3.4)
    )
    for _ in range(2):
        for name in ("a.mp4", "b/c.mp4"):
            assert torch.equal(encoder.check(pair("p", name)).prompt, encoder.encode(pair("p", name)).prompt)
    assert set(prepared) - {300.0} == {3.0, 3.4}
    assert len(prepared) == 2 + 4 + (2 if tells_time else 1), "asked twice whether it matters, then once for each"


def test_text_pairs_need_no_video_and_no_video_model(captioner: CaptionModel) -> None:
    tokenizer = byte_tokenizer()
    for lm in (captioner, CaptionModel(tiny_text_model(tokenizer), tokenizer, None)):
        encoded = PairEncoder(lm).encode(pair("p", None))
        assert encoded.vision == {}
        assert lm.tokenizer.decode(encoded.prompt) == "<|user|>Describe.<|end|><|assistant|>"


def test_a_conversation_is_the_prompt_and_its_first_question_shows_the_video(
    captioner: CaptionModel, videos: Path
) -> None:
    turns = [("system", "Be brief."), ("user", "What?"), ("assistant", "A bar."), ("user", "And?")]
    asked = [{"role": role, "content": text} for role, text in turns]
    encoder = PairEncoder(captioner, videos, SAMPLING)
    for video, shown in ((None, ""), ("a.mp4", "<video>" * 13)):
        encoded = encoder.encode(Pair("p", video, asked, "It moves.", "It rains."))
        assert captioner.tokenizer.decode(encoded.prompt) == (
            f"<|system|>Be brief.<|end|><|user|>{shown}What?<|end|><|assistant|>A bar.<|end|><|user|>And?<|end|><|assistant|>"
        )
    with pytest.raises(PairError, match="prompt unusable: it contains <video>"):
        encoder.encode(Pair("p", "a.mp4", [asked[0] | {"content": "See <video>."}, *asked[1:]], "a", "b"))


BAD = {
    "chosen answer empty": pair("e", chosen=" \n"),
    "rejected answer empty": pair("r", rejected=""),
    "chosen equals rejected": pair("s", chosen="same", rejected=" same "),
    "video missing": pair("m", "nowhere.mp4"),
    "video unreadable": pair("c", "corrupt.mp4"),
    "answer too long": pair("l", rejected="word " * 40),
    "prompt unusable": Pair("v", "a.mp4", "What is <video>?", "a", "b"),
    "chosen answer unusable": pair("w", chosen="A <video> of a bar."),
    "rejected answer unusable": pair("x", None, rejected="An <image>."),
    "chosen answer unusable ": pair("y", chosen="A bar.<|end|> A cat."),
}


@pytest.mark.parametrize("reason", BAD)
@pytest.mark.parametrize("look", ["encode", "check"])
def test_a_pair_that_cannot_be_used_says_why(reason: str, look: str, captioner: CaptionModel, videos: Path) -> None:
    encoder = PairEncoder(captioner, videos, SAMPLING, max_completion_length=40)
    with pytest.raises(PairError) as caught:
        getattr(encoder, look)(BAD[reason])
    assert caught.value.reason == reason.strip()
    assert str(caught.value).startswith(f"pair {BAD[reason].id}: {reason.strip()}: ")


def test_one_file_ends_nothing(captioner: CaptionModel, tmp_path: Path) -> None:
    """What does not open is left out at the start, what does not decode when its turn comes."""
    write_latin(tmp_path / "latin.mp4")
    write_unfinished(tmp_path / "unfinished.mp4")
    (tmp_path / "noise.mp4").write_bytes(b"not a video")
    pairs = [pair(name, f"{name}.mp4") for name in ("unfinished", "latin", "noise")]
    found = PairDataset(PairEncoder(captioner, tmp_path, SAMPLING), pairs, progress=False)
    left = [error for error in found.dropped if error.reason == "video unreadable"]
    assert [error.pair for error in left] == ["noise"]
    assert all(f"{error.pair}.mp4" in str(error) for error in left)
    first = found[0]
    assert first.id == "latin" and "unfinished.mp4: " in first.instead


@pytest.mark.parametrize("error", [FileNotFoundError(2, "gone"), OSError(5, "Input/output error")])
def test_a_file_that_goes_away_while_features_are_looked_up(
    error: OSError, captioner: CaptionModel, videos: Path, tmp_path: Path
) -> None:
    def key(*args: Any) -> str:
        raise error

    cache = VisionCache(tmp_path, captioner)
    cache.key = key  # type: ignore[method-assign]
    with pytest.raises(PairError, match=rf"video unreadable: .*a\.mp4: {error.strerror}"):
        PairEncoder(captioner, videos, SAMPLING, features=cache).encode(pair("p"))


def test_text_pairs_for_a_video_model_hold_no_placeholder(captioner: CaptionModel) -> None:
    """It would be trained on as a word, or take another pair's visual features."""
    with pytest.raises(PairError, match="pair p: prompt unusable: it contains <video>, which stands for what"):
        PairEncoder(captioner).encode(Pair("p", None, "What is <video>?", "a", "b"))
    tokenizer = byte_tokenizer()
    text = CaptionModel(tiny_text_model(tokenizer), tokenizer, None)
    assert PairEncoder(text).encode(Pair("p", None, "What is <video>?", "a", "b")).id == "p"


@pytest.mark.parametrize("video", ["empty.mp4", "../secret.mp4", "/etc/passwd"])
def test_zero_frames_and_paths_that_leave_the_folder(video: str, captioner: CaptionModel, videos: Path) -> None:
    with pytest.raises(PairError, match=r"unreadable|leaves the videos folder"):
        PairEncoder(captioner, videos, SAMPLING).encode(pair("p", video))


def test_the_limits_are_exact(captioner: CaptionModel, videos: Path) -> None:
    encoded = PairEncoder(captioner, videos, SAMPLING).encode(pair("p"))
    answer = max(len(encoded.chosen), len(encoded.rejected))
    total = len(encoded.prompt) + answer
    fits = PairEncoder(captioner, videos, SAMPLING, total, answer)
    assert torch.equal(fits.encode(pair("p")).prompt, encoded.prompt)
    fits.check(pair("p"))
    for tight, reason in (
        (PairEncoder(captioner, videos, SAMPLING, total - 1, answer), "prompt and answer too long"),
        (PairEncoder(captioner, videos, SAMPLING, total, answer - 1), "answer too long"),
    ):
        for look in (tight.encode, tight.check):
            with pytest.raises(PairError) as caught:
                look(pair("p"))
            assert caught.value.reason == reason


def test_the_models_context_is_the_limit_when_none_is_given(captioner: CaptionModel, videos: Path) -> None:
    with pytest.raises(PairError, match="max_length is 4096"):
        PairEncoder(captioner, videos, SAMPLING).encode(pair("p", chosen="word " * 3000))


def test_a_video_without_a_folder_or_for_a_text_model_is_a_configuration_error(
    captioner: CaptionModel, videos: Path
) -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(ConfigError, match="--videos should name the folder"):
        PairEncoder(captioner).encode(pair("p"))
    with pytest.raises(ConfigError, match="is a text model"):
        PairEncoder(CaptionModel(tiny_text_model(tokenizer), tokenizer, None), videos).encode(pair("p"))


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_the_dataset_drops_with_a_count(cache_bytes: int, captioner: CaptionModel, videos: Path) -> None:
    encoder = PairEncoder(captioner, videos, SAMPLING, max_completion_length=40)
    pairs = [pair("1"), *BAD.values(), pair("2", "b/c.mp4"), pair("2"), pair("m2", "gone.mp4")]
    dataset = PairDataset(encoder, pairs, cache_bytes=cache_bytes, progress=False)
    assert [e.id for e in dataset] == ["1", "2"]
    reasons = {reason: count for reason, count, _ in dataset.reasons()}
    expected = Counter(reason.strip() for reason in BAD) + Counter({"video missing": 1, "id twice": 1})
    assert reasons == expected
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(dataset.table())
    text = console.export_text()
    assert "14 preference pairs" in text
    assert "dropped: video missing" in text


def test_what_fits_is_decoded_once(captioner: CaptionModel, videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = tokenize.read_frames
    monkeypatch.setattr(tokenize, "read_frames", lambda *a: calls.append(1) or original(*a))
    encoder = PairEncoder(captioner, videos, SAMPLING)
    one = encoder.encode(pair("0")).nbytes
    calls.clear()
    dataset = PairDataset(encoder, [pair(str(i)) for i in range(4)], cache_bytes=one + 1, progress=False)
    assert not calls, "nothing is decoded before it is asked for"
    for _ in range(3):
        list(dataset)
    assert len(calls) == 4 + 2 * 2  # the second one overfills the memory and is kept, the rest are decoded again


def test_no_usable_pair_is_an_error_with_the_reasons(captioner: CaptionModel, videos: Path) -> None:
    with pytest.raises(ValueError, match=r"none of the 2 pairs can be used: 2 video missing \(e\.g\. pair x"):
        PairDataset(PairEncoder(captioner, videos), [pair("x", "no.mp4"), pair("y", "no.mp4")], progress=False)


@pytest.mark.parametrize("begins", [False, True], ids=["no start", "a start of text"])
def test_plain_pairs_of_a_base_model_are_tokenized_as_trl_does(begins: bool) -> None:
    """Without a chat template: prompt + answer as one text, cut where the prompt's tokens end, and the end of sequence."""
    tokenizer = byte_tokenizer(["The sky is blue."] * 5)
    tokenizer.chat_template = None
    if begins:
        tokenizer.add_special_tokens({"bos_token": "<s>"})
        start = [("<s>", tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", "<s> $A <s> $B", start)
    lm = CaptionModel(tiny_text_model(tokenizer), tokenizer, None)
    encoder = PairEncoder(lm)
    pairs = [
        Pair("1", None, "The sky is", " blue.", " made of cheese,\n all of it"),
        Pair("2", None, "def f(x):\n", "    return x", "    pass"),
    ]
    for pair, encoded in zip(pairs, PairDataset(encoder, pairs, progress=False)):
        prompt = tokenizer(pair.prompt).input_ids
        assert encoded.prompt.tolist() == prompt and (prompt[0] == tokenizer.bos_token_id) == begins
        for side in ("chosen", "rejected"):
            whole = tokenizer(pair.prompt + getattr(pair, side)).input_ids
            assert whole[: len(prompt)] == prompt, "else nothing can be compared"
            assert getattr(encoded, side).tolist() == [*whole[len(prompt) :], tokenizer.eos_token_id]
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    with pytest.raises(
        PairError, match=r"prompt unusable: the tokenizer has no chat template, .* set model\.chat_template"
    ):
        encoder.encode(Pair("3", None, turns, "a", "b"))
