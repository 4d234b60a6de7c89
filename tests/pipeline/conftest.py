"""A tiny captioner and small real mp4 files for the tests of the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import pytest

from devices import DEVICE
from judge_endpoint import KEY, Endpoint
from synpo.config import ModelConfig
from synpo.model.adapter import CaptionModel, load


@pytest.fixture(scope="session")
def captioner(tiny_captioner_path: Path) -> CaptionModel:
    """A random video captioner in fp32."""
    return load(ModelConfig(path=str(tiny_captioner_path), device=DEVICE))


def _write_video(path: Path, seconds: float = 3.0, fps: int = 8, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    colour = rng.integers(60, 255, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width = stream.height = 48
        stream.pix_fmt = "yuv420p"
        count = round(seconds * fps)
        for i in range(count):
            image = np.zeros((48, 48, 3), np.uint8)
            x = int(36 * i / count)
            image[20:32, x : x + 12] = colour
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="session")
def write_video() -> Callable[..., Path]:
    """write_video(path, seconds, fps, seed): a coloured square that crosses a black frame, as H.264."""
    return _write_video


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with four good videos, one below a subfolder."""
    root = tmp_path_factory.mktemp("videos")
    for index, name in enumerate(("a.mp4", "b.mp4", "c.mp4", "deep/d.mp4")):
        _write_video(root / name, seconds=2.0 + index, seed=index)
    return root


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("TEST_JUDGE_KEY", KEY)
    found = Endpoint()
    yield found
    found.server.shutdown()
    found.server.server_close()
