"""Visual features on disk: the frozen tower runs once per video and run, not once per pair and epoch.

    folder/<key>.safetensors     what `encode_vision` made of the frames of one video, as tensors

The key is a hash of the video's content and size, the seconds its frames were taken at, how frames are read, and the tower:
its weights, their dtype, that of mixed precision, and the settings of its preprocessing. So nothing stale is ever read,
whatever was changed in between. A file appears whole or not at all; one that cannot be read, or whose checksum is not its own,
is made again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from synpo.config import ConfigError
from synpo.model.adapter import CaptionModel
from synpo.model.gather import is_partitioned
from synpo.model.vision import Vision
from synpo.records import atomic_path, record_id
from synpo.video.frames import READING

CHUNK = 1 << 20


class VisionCache:
    """Features of videos as one model's vision tower sees them.

    Args:
        folder: made when something is written. lm: the model; its tower is not to be trained afterwards.
        autocast: dtype of mixed precision that the tower runs in; None without.

    Raises ConfigError when the model's forward does not accept features.
    """

    def __init__(self, folder: Path, lm: CaptionModel, autocast: torch.dtype | None = None) -> None:
        self.folder, self.lm, self.autocast = folder, lm, autocast
        if is_partitioned(lm.model):
            raise ConfigError(
                "train.cache_vision: the tower of a model that ZeRO-3 has partitioned runs in training alone; set "
                "train.cache_vision = false, or use ZeRO-2 or FSDP"
            )
        if lm.vision is not None and not lm.vision.takes_features:
            raise ConfigError(
                f"train.cache_vision: {type(lm.base).__name__} of this release of transformers takes pixels only; install a "
                "newer transformers, or set train.cache_vision = false"
            )
        self.tower = "" if lm.vision is None else _tower(lm) + (str(autocast) if autocast else "")

    def key(self, path: Path, times: Sequence[float]) -> str:
        """Name of the features of a video's frames at `times` in seconds."""
        stat = path.stat()
        content = _content(path, stat.st_size, stat.st_mtime_ns)
        return record_id(content, stat.st_size, [round(t, 6) for t in times], READING, self.tower)

    def read(self, key: str) -> Vision | None:
        """What was stored under `key`; None when there is nothing, or nothing that can be read."""
        try:
            with safe_open(self._path(key), "pt") as file:
                found = {name: file.get_tensor(name) for name in sorted(file.keys())}
                return found if checksum(found) == (file.metadata() or {}).get("crc32") else None
        except (FileNotFoundError, SafetensorError):
            return None

    def make(self, key: str, vision: Vision) -> Vision:
        """Run the tower over the pixels of `vision` and `write` what it gives."""
        with torch.autocast(self.lm.device.type, self.autocast, enabled=self.autocast is not None):
            (features,) = self.lm.encode_vision([vision])
        return self.write(key, features)

    def write(self, key: str, vision: Vision) -> Vision:
        """Store the tensors of `vision` under `key`; returns them on the CPU, as `read` will.

        Raises OSError where they cannot be written, as on a full disk.
        """
        tensors = {name: vision[name].detach().cpu().contiguous() for name in sorted(vision)}
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(self._path(key)) as temporary:
            try:
                save_file(tensors, temporary, {"crc32": checksum(tensors)})
            except SafetensorError as error:  # is no OSError, whatever it comes from
                number = re.search(r"os error (\d+)", str(error))
                raise OSError(int(number[1]) if number else errno.EIO, str(error), str(self._path(key))) from error
        return tensors

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


@lru_cache(maxsize=65536)
def _content(path: Path, size: int, changed: int) -> str:
    """Hash of a whole file; read again when its size or its time of change is another."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().data


def checksum(tensors: Vision) -> str:
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(_bytes(tensors[name]), zlib.crc32(f"{name}{tuple(tensors[name].shape)}".encode(), total))
    return f"{total:08x}"


def _tower(lm: CaptionModel) -> str:
    """Hash of everything between frames and features: weights outside the language model, and preprocessing."""
    assert lm.vision is not None
    digest = hashlib.sha256(json.dumps(lm.vision.settings, sort_keys=True, default=str).encode())
    for name, parameter in lm.vision_parameters():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(_bytes(parameter))
    return digest.hexdigest()
