"""What a model is, as a short hash, so that records made with one model are never taken for another's.

A local folder is known by the content of its weights and settings, a hub id by its name and revision. The same weights in
another format (`dtype`, `quantization`), or asked through another chat template, say other things.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from synpo.config import ModelConfig
from synpo.model.chat import read_template
from synpo.records import record_id

EDGE = 1 << 20  # bytes read at each end of a large file
KEPT = ("*.safetensors", "*.json", "*.jinja", "*.model")


def _content(path: Path) -> str:
    """Hash of a file: all of it up to 64 MiB, else its size and both ends."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if size <= 64 * EDGE:
            digest.update(file.read())
        else:
            digest.update(file.read(EDGE))
            file.seek(-EDGE, 2)
            digest.update(file.read())
    return digest.hexdigest()


def _folder(path: str) -> object:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return path
    return [[p.name, _content(p)] for p in sorted({p for pattern in KEPT for p in folder.glob(pattern)})]


def fingerprint(config: ModelConfig) -> str:
    """16 hexadecimal digits for the model and the adapter a configuration names, as they are loaded."""
    formats = [] if (config.dtype, config.quantization) == ("auto", "none") else [config.dtype, config.quantization]
    chat: list[object] = [] if config.chat_template is None else [read_template(config.chat_template)]
    chat += [x for x in (config.template_variables, config.answer_prefix) if x]
    return record_id(_folder(config.path), config.revision, config.adapter and _folder(config.adapter), *formats, *chat)
