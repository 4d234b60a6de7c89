"""Features on disk: made once, never stale, never trusted when damaged."""

import errno
import os
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from synpo.config import ConfigError
from synpo.data import features
from synpo.data.features import VisionCache
from synpo.data.tokenize import PairDataset, PairEncoder
from synpo.model.adapter import CaptionModel
from synpo.records import Pair
from synpo.video import FrameSampling

SAMPLING = FrameSampling(fps=1.0, minimum=2, maximum=4)


def pair(name: str, video: str = "a.mp4") -> Pair:
    return Pair(name, video, "Describe.", "A bar moves.", "It rains.")


@pytest.fixture
def lm(captioner: CaptionModel) -> CaptionModel:
    return captioner


@pytest.fixture
def looks(lm: CaptionModel) -> Iterator[list[int]]:
    """Frames of every call of the vision tower."""
    seen: list[int] = []
    hook = lm.base.model.vision_tower.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    yield seen
    hook.remove()


def encoder(lm: CaptionModel, videos: Path, folder: Path, sampling: FrameSampling = SAMPLING) -> PairEncoder:
    return PairEncoder(lm, videos, sampling, features=VisionCache(folder, lm))


def test_the_tower_runs_once_a_video_and_run(lm: Any, videos: Path, tmp_path: Path, looks: list[int]) -> None:
    pairs = [pair("1"), pair("2"), pair("3", "b/c.mp4")]
    first = PairDataset(encoder(lm, videos, tmp_path), pairs, cache_bytes=0, progress=False)
    assert looks == [3, 3]  # two videos of 3 frames, the first in two pairs
    again = PairDataset(encoder(lm, videos, tmp_path), pairs, progress=False)
    plain = PairDataset(PairEncoder(lm, videos, SAMPLING), pairs, progress=False)
    for _ in range(2):
        for one, two, three in zip(first, again, plain):
            expected = lm.encode_vision([three.vision])[0]["features"]
            looks.pop()
            assert torch.equal(one.vision["features"], two.vision["features"])
            assert torch.equal(one.vision["features"], expected.cpu())
            assert torch.equal(one.prompt, three.prompt)
            assert torch.equal(two.prompt, three.prompt)
    assert looks == [3, 3]
    assert len(list(tmp_path.glob("*"))) == 2


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "noise"])
def test_a_damaged_file_is_made_again(damage: str, lm: Any, videos: Path, tmp_path: Path, looks: list[int]) -> None:
    expected = encoder(lm, videos, tmp_path).encode(pair("1")).vision["features"]
    (file,) = tmp_path.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[-10] ^= 1
    file.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "noise": b"\xff" * 100}.get(damage, content))
    for _ in range(2):
        assert torch.equal(encoder(lm, videos, tmp_path).encode(pair("1")).vision["features"], expected)
    assert looks == [3, 3]
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


def test_what_was_changed_is_looked_at_again(lm: Any, videos: Path, tmp_path: Path) -> None:
    other = deepcopy(lm)
    with torch.no_grad():
        next(other.base.model.vision_tower.parameters())[0] += 1e-3
    whiter = deepcopy(lm)
    whiter.vision.mean = whiter.vision.mean + 0.1
    words = deepcopy(lm)
    with torch.no_grad():
        words.head().weight[0] += 1.0
    path, times = videos / "a.mp4", [0.5, 1.5]
    key = VisionCache(tmp_path, lm).key(path, times)
    assert key == VisionCache(tmp_path / "elsewhere", words).key(path, times)  # the language model does not matter
    keys = {
        key,
        VisionCache(tmp_path, other).key(path, times),
        VisionCache(tmp_path, whiter).key(path, times),
        VisionCache(tmp_path, lm).key(path, [0.5, 1.25]),
        VisionCache(tmp_path, lm).key(videos / "b/c.mp4", times),
    }
    assert len(keys) == 5
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(path.read_bytes())
    assert VisionCache(tmp_path, lm).key(copy, times) == key
    changed = bytearray(copy.read_bytes())
    changed[-1] ^= 1
    copy.write_bytes(changed)
    os.utime(copy, ns=(1, 1))
    assert VisionCache(tmp_path, lm).key(copy, times) != key


def test_a_full_disk_is_an_oserror_and_leaves_nothing(
    lm: Any, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(features, "save_file", full)
    with pytest.raises(OSError, match=r"No space left on device .*\.safetensors") as caught:
        encoder(lm, videos, tmp_path).encode(pair("1"))
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_a_model_that_takes_pixels_only_is_refused(lm: Any, tmp_path: Path) -> None:
    old = CaptionModel(lm.model, lm.tokenizer, SimpleNamespace(takes_features=False))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="takes pixels only; install a newer transformers"):
        VisionCache(tmp_path, old)
