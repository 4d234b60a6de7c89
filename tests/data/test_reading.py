"""Tokens of pairs are read once: in processes, and for the next start; nothing stale is ever used."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from made_videos import write_video
from synpo.config import ConfigError
from synpo.data import reading
from synpo.data.reading import PairError, TokenCache, Tokens, read_tokens
from synpo.data.tokenize import PairDataset, PairEncoder
from synpo.model.adapter import CaptionModel
from synpo.records import Pair
from synpo.video import FrameSampling

SAMPLING = FrameSampling(fps=1.0, minimum=2, maximum=4)


def pairs_of(videos: int = 2, texts: int = 3) -> list[Pair]:
    found = [
        Pair(f"v{i}", ("a.mp4", "b/c.mp4")[i % 2], f"Describe {i}.", f"A bar {i}.", "It rains.") for i in range(videos)
    ]
    return found + [Pair(f"t{i}", None, f"Say {i}.", f"It is {i}.", "No.") for i in range(texts)]


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the pairs that are looked at."""
    seen: list[str] = []
    real = PairEncoder.tokens
    monkeypatch.setattr(PairEncoder, "tokens", lambda self, pair: seen.append(pair.id) or real(self, pair))
    return seen


@pytest.fixture
def read(captioner: CaptionModel, videos: Path, tmp_path: Path) -> Callable[..., Any]:
    def call(
        pairs: list[Pair], folder: Path = videos, sampling: FrameSampling = SAMPLING, cached: bool = True
    ) -> list[Any]:
        cache = TokenCache(tmp_path / "cache") if cached else None
        return read_tokens(PairEncoder(captioner, folder, sampling), pairs, cache, progress=False)

    return call


def same(one: Tokens, two: Tokens) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(two, name)) for name in ("prompt", "chosen", "rejected"))


def test_the_next_start_reads_nothing(captioner: CaptionModel, videos: Path, tmp_path: Path, looked: list[str]) -> None:
    cache, pairs = TokenCache(tmp_path), pairs_of()
    encoder = PairEncoder(captioner, videos, SAMPLING)
    first = PairDataset(encoder, pairs, cache=cache, progress=False)
    assert looked == [pair.id for pair in pairs]
    second = PairDataset(PairEncoder(captioner, videos, SAMPLING), pairs, cache=cache, progress=False)
    assert len(looked) == len(pairs) and second.lengths == first.lengths
    for one, two, pair in zip(first, second, pairs):
        for part in ("prompt", "chosen", "rejected"):
            assert torch.equal(getattr(one, part), getattr(two, part)) and getattr(two, part).dtype == torch.int64
            assert torch.equal(getattr(two, part), getattr(encoder.encode(pair), part))
    limit = max(lengths.prompt for lengths in first.lengths)
    tight = PairDataset(PairEncoder(captioner, videos, SAMPLING, limit), pairs, cache=cache, progress=False)
    assert [error.reason for error in tight.dropped] == ["prompt and answer too long"] * 2, (
        "limits are not in the cache"
    )


def variables(lm: CaptionModel) -> None:
    lm.chat.variables = {"enable_thinking": False}


def prefix(lm: CaptionModel) -> None:
    lm.chat.answer_prefix = "Well: "


def template(lm: CaptionModel) -> None:
    lm.tokenizer.chat_template += " "


def token(lm: CaptionModel) -> None:
    lm.tokenizer.add_tokens(["<new>"])


def picture(lm: CaptionModel) -> None:
    lm.vision.side = 24  # type: ignore[union-attr]


@pytest.mark.parametrize("change", [variables, prefix, template, token, picture])
def test_what_makes_other_tokens_is_another_reader(change: Any, captioner: CaptionModel, videos: Path) -> None:
    before = PairEncoder(captioner, videos, SAMPLING).reader
    assert PairEncoder(captioner, videos, SAMPLING).reader == before
    held = captioner.tokenizer, captioner.chat, captioner.vision.side  # type: ignore[union-attr]
    captioner.tokenizer, captioner.chat = copy.deepcopy(held[0]), copy.copy(held[1])
    try:
        change(captioner)
        assert PairEncoder(captioner, videos, SAMPLING).reader != before
    finally:
        captioner.tokenizer, captioner.chat, captioner.vision.side = held  # type: ignore[union-attr]


def test_another_video_other_texts_or_frames_are_read(
    read: Any, looked: list[str], videos: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "videos"
    shutil.copytree(videos, folder)
    pairs = pairs_of(videos=2, texts=1)
    read(pairs, folder)
    looked.clear()
    read(pairs, folder)
    assert not looked
    before = (folder / "a.mp4").stat()
    write_video(folder / "a.mp4", 90, frames=40)
    os.utime(folder / "a.mp4", ns=(before.st_atime_ns, before.st_mtime_ns))
    read(pairs, folder)
    assert looked == ["v0"]
    looked.clear()
    read([*pairs[:2], Pair("t0", None, "Say 0.", "It is another.", "No.")], folder)
    assert looked == ["t0"]
    looked.clear()
    read(pairs, folder, FrameSampling(fps=1.0, minimum=2, maximum=2))
    assert looked == ["v0", "v1", "t0"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "noise"])
def test_a_broken_file_is_named_and_made_again(damage: str, read: Any, looked: list[str], tmp_path: Path) -> None:
    pairs = pairs_of()
    first = read(pairs)
    (file,) = (tmp_path / "cache").glob("*/*.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[-10] ^= 1
    file.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "noise": b"\xff" * 100}.get(damage, content))
    looked.clear()
    with pytest.warns(UserWarning, match=rf"{file.name} cannot be read .*: its pairs are tokenized again"):
        second = read(pairs)
    assert len(looked) == len(pairs) and all(map(same, first, second))
    looked.clear()
    assert all(map(same, first, read(pairs))) and not looked


def test_pairs_that_cannot_be_used_are_looked_at_every_time(read: Any, looked: list[str], videos: Path) -> None:
    bad = [
        Pair("m", "nowhere.mp4", "What?", "a", "b"),
        Pair("c", "corrupt.mp4", "What?", "a", "b"),
        Pair("e", None, "?", "", "b"),
    ]
    for expected in (["v0", "v1", "t0", "m", "c", "e"], ["m", "c", "e"], ["m", "c", "e"]):
        found = read([*pairs_of(texts=1), *bad])
        assert looked == expected
        assert [error.reason for error in found[3:]] == ["video missing", "video unreadable", "chosen answer empty"]
        looked.clear()


def test_a_pair_more_is_all_that_is_read(read: Any, looked: list[str]) -> None:
    read(pairs_of(0, 12))
    looked.clear()
    read([*pairs_of(1, 6), *pairs_of(0, 12)[6:], Pair("t12", None, "Say 12.", "It is 12.", "No.")])
    assert looked == ["v0", "t12"]


def test_processes_read_what_one_reads(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [*pairs_of(4, 30), Pair("m", "nowhere.mp4", "What?", "a", "b")]
    expected = read(pairs, cached=False)
    monkeypatch.setattr(reading, "_workers", lambda *_: 2)
    state = torch.get_rng_state()
    found = read(pairs)
    assert torch.equal(state, torch.get_rng_state()), "training draws what it would have drawn"
    assert all(map(same, found[:-1], expected[:-1]))
    assert isinstance(found[-1], PairError) and str(found[-1]) == str(expected[-1])


@pytest.mark.parametrize("count", [0, 2])
def test_a_setting_that_serves_no_pair_ends_it(
    count: int, captioner: CaptionModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(reading, "_workers", lambda *_: count)
    with pytest.raises(ConfigError, match="^pair v0 has the video a.mp4; --videos should name the folder it is in$"):
        read_tokens(PairEncoder(captioner), pairs_of(), TokenCache(tmp_path), progress=False)


def test_how_many_processes_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert [reading._workers(n, True, 1) for n in (10, 40, 10_000)] == [0, 2, 8]
    assert [reading._workers(n, False, 1) for n in (900, 10_000)] == [0, 8]
    assert [reading._workers(10_000, True, p) for p in (2, 8)] == [4, 0]


def test_what_is_read_stays_when_reading_is_cut_off(
    read: Any, monkeypatch: pytest.MonkeyPatch, looked: list[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(reading, "PAIRS", 4)
    pairs = pairs_of(0, 12)
    real = PairEncoder.tokens

    def cut_off(self: PairEncoder, pair: Pair) -> Tokens:
        if pair.id == "t10":
            raise KeyboardInterrupt
        return real(self, pair)

    with monkeypatch.context() as patch:
        patch.setattr(PairEncoder, "tokens", cut_off)
        with pytest.raises(KeyboardInterrupt):
            read(pairs)
    looked.clear()
    read(pairs)
    assert looked == ["t10", "t11"] and len(list(tmp_path.glob("cache/*/*"))) == 4


def test_the_cache_is_bounded_and_keeps_what_was_used_last(tmp_path: Path) -> None:
    cache = TokenCache(tmp_path, limit=3000)
    row = Tokens(*(np.zeros(100, np.int32),) * 3)  # 1.2 kB and a header
    for i, name in enumerate(("a", "b", "c")):
        cache.write("r", {name: row})
        for file in tmp_path.glob("r/*"):
            os.utime(file, (i, i))
    (tmp_path / "r" / ".x.safetensors.1.tmp").write_bytes(b"left by a killed writer")
    os.utime(tmp_path / "r" / ".x.safetensors.1.tmp", (0, 0))
    assert cache.read("r", {"a"}).keys() == {"a"}  # used just now
    assert not cache.read("other", {"a"})
    cache.trim()
    assert "a" in cache.read("r", {"a", "b", "c"}) and not list(tmp_path.glob("*/.*"))
    assert sum(f.stat().st_size for f in tmp_path.glob("*/*")) <= 3000


def test_a_folder_that_cannot_be_written_is_said_once(captioner: CaptionModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="tokens of pairs are not kept for the next start") as said:
        cache = TokenCache(tmp_path / "file" / "cache")
        for _ in range(2):
            assert len(read_tokens(PairEncoder(captioner), pairs_of(0, 3), cache, progress=False)) == 3
    assert len([w for w in said if "not kept" in str(w.message)]) == 1
