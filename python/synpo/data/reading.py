"""Tokens of all pairs at the start of a run: read in several processes, and kept for the next start, run or `synpo plan`.

    $XDG_CACHE_HOME/synpo/tokens/<reader>/<name>.safetensors    of some pairs: "ids" int32, one after the other; "lengths" (n, 3)
                                                                int32 of prompt, chosen and rejected; in the metadata their keys

The reader is a hash of all that turns pairs into tokens (tokenizer, chat template and its settings, processor, frames, versions),
a key one of a pair's texts and of its video (size, time of change, both ends of its content). Limits of length are applied
afterwards. A file appears whole or not at all; one that cannot be read, or whose checksum is wrong, is named and made again.
What was not used longest goes where all files come to more than LIMIT. Only what could be read is kept: a pair that could not be
used is looked at every time.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import time
import warnings
import zlib
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch.utils.data import DataLoader, Dataset

from synpo.config import ConfigError
from synpo.progress import Bar
from synpo.records import Pair, atomic_path, record_id

if TYPE_CHECKING:
    from synpo.data.tokenize import PairEncoder
    from synpo.model.adapter import CaptionModel

FORMAT = 1
LIMIT = 2 << 30  # bytes on disk
PAIRS, SECONDS = 512, 20.0  # what is read is written after so many, at the latest
ENDS = 16384  # bytes of both ends of a video that are looked at
STALE = 86400.0  # seconds after which a half-written file belongs to nobody


class PairError(ValueError):
    """A pair that cannot be trained on. `reason` is one of a few fixed phrases, `detail` says what was found."""

    def __init__(self, pair: str, reason: str, detail: str) -> None:
        super().__init__(f"pair {pair}: {reason}: {detail}")
        self.pair, self.reason, self.detail = pair, reason, detail


@dataclass(frozen=True)
class Tokens:
    """Ids of a pair, int32 (P,), (C,), (R,): prompt with visual placeholders, answers with their ends."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "synpo" / "tokens"


def reader_of(lm: CaptionModel) -> str:
    """Hash of all that stands between the texts and frames of a pair and its tokens, but for how frames are chosen."""
    tokenizer, chat, vision = lm.tokenizer, lm.chat, lm.vision
    fast = getattr(tokenizer, "is_fast", False)
    words = tokenizer.backend_tokenizer.to_str() if fast else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    facts = [FORMAT, words, tokenizer.chat_template, chat.variables, chat.answer_prefix, asdict(chat.turn), chat.ends]
    facts += [type(tokenizer).__name__, sorted(lm.placeholder_ids), lm.base.config.model_type]
    facts += [importlib.metadata.version(name) for name in ("transformers", "tokenizers")]
    if vision is not None:
        facts += [type(vision).__name__, vision.settings, getattr(vision, "per_frame", None)]
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(re.sub(r"0x[0-9a-f]+", "", text).encode()).hexdigest()


def stamp(video: Path) -> str:
    """What a file is recognised by without reading all of it. Raises OSError."""
    with open(video, "rb") as file:
        stat = os.fstat(file.fileno())
        ends = file.read(ENDS)
        file.seek(max(0, stat.st_size - ENDS))
        ends += file.read(ENDS)
    return f"{stat.st_size} {stat.st_mtime_ns} {hashlib.sha256(ends).hexdigest()}"


class TokenCache:
    """Tokens of pairs on disk. Args: `folder` is made when something is written; `limit`: bytes of all its files."""

    def __init__(self, folder: Path | None = None, limit: int = LIMIT) -> None:
        self.folder, self.limit = folder or cache_folder(), limit
        self.writable = True

    def read(self, reader: str, keys: Collection[str]) -> dict[str, Tokens]:
        """What is known of `keys`."""
        known: dict[str, Tokens] = {}
        for path in sorted((self.folder / reader).glob("*.safetensors")):
            try:
                known |= self._read(path, keys)
            except FileNotFoundError:  # removed by another run
                continue
            except (OSError, SafetensorError, ValueError, KeyError) as error:
                warnings.warn(f"{path} cannot be read ({error}): its pairs are tokenized again", stacklevel=2)
                with suppress(OSError):
                    path.unlink()
        return known

    def _read(self, path: Path, keys: Collection[str]) -> dict[str, Tokens]:
        with safe_open(path, "pt") as file:  # which maps the file where "numpy" would copy it
            metadata = file.metadata() or {}
            found = metadata["keys"].split()
            if not any(key in keys for key in found):
                return {}
            ids, lengths = file.get_tensor("ids").numpy(), file.get_tensor("lengths").numpy()
        if _checksum(ids, lengths, metadata["keys"]) != metadata["crc32"]:
            raise ValueError("its checksum is not its own")
        os.utime(path)
        parts = np.split(ids, np.cumsum(lengths.reshape(-1))[:-1])
        return {key: Tokens(*parts[3 * i : 3 * i + 3]) for i, key in enumerate(found) if key in keys}

    def write(self, reader: str, tokens: Mapping[str, Tokens]) -> None:
        """Keep tokens by their keys; where that fails, it is said, and not tried again."""
        if not tokens or not self.writable:
            return
        rows = [(found.prompt, found.chosen, found.rejected) for found in tokens.values()]
        ids = np.concatenate([part for row in rows for part in row]).astype(np.int32)
        lengths = np.array([[len(part) for part in row] for row in rows], dtype=np.int32)
        names = " ".join(tokens)
        metadata = {"keys": names, "crc32": _checksum(ids, lengths, names)}
        try:
            (self.folder / reader).mkdir(parents=True, exist_ok=True, mode=0o700)
            with atomic_path(self.folder / reader / f"{record_id(names)}.safetensors") as temporary:
                save_file({"ids": ids, "lengths": lengths}, temporary, metadata)
        except (OSError, SafetensorError) as error:
            self.writable = False
            warnings.warn(f"tokens of pairs are not kept for the next start: {error}", stacklevel=2)

    def trim(self) -> None:
        """Remove the files that were not used longest, as far as all of them come to more than the limit."""
        with suppress(OSError):
            files = [file for file in self.folder.glob("*/*") if file.is_file()]
            found = sorted((file.stat().st_mtime, file.stat().st_size, file) for file in files)
            total = sum(size for _, size, _ in found)
            for used, size, file in found:
                if total > self.limit or (file.suffix == ".tmp" and time.time() - used > STALE):
                    file.unlink(missing_ok=True)
                    total -= size


def _checksum(ids: np.ndarray, lengths: np.ndarray, keys: str) -> str:
    return f"{zlib.crc32(ids.tobytes(), zlib.crc32(lengths.tobytes(), zlib.crc32(keys.encode()))):08x}"


def read_tokens(
    encoder: PairEncoder,
    pairs: Sequence[Pair],
    cache: TokenCache | None = None,
    *,
    processes: int = 1,
    progress: bool = True,
) -> list[Tokens | PairError]:
    """What `encoder.tokens` makes of every pair, or the error it raises.

    Args:
        cache: what is there is not read again, and what is read is put there. processes: training processes on this machine,
            each of which reads.

    Raises ConfigError where no pair's video could be used (`encoder.tokens`).
    """
    named = [None if cache is None else encoder.key(pair) for pair in pairs]
    reader = "" if cache is None else encoder.reader
    known = {} if cache is None else cache.read(reader, {key for key in named if key is not None})
    found: list[Tokens | PairError | None] = [None if key is None else known.get(key) for key in named]
    missing = [i for i, tokens in enumerate(found) if tokens is None]
    count = _workers(len(missing), any(pairs[i].video is not None for i in missing), processes)
    looks = DataLoader(
        _Looks(encoder, [pairs[i] for i in missing]),
        batch_size=None,
        num_workers=count,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # its seed is not the training's
    )
    fresh, written = {}, time.monotonic()
    bar = Bar(
        desc="reading pairs", unit="pair", total=len(pairs), initial=len(pairs) - len(missing), disable=not progress
    )
    try:
        for i, result in zip(missing, looks):
            if isinstance(result, ConfigError):
                raise result
            found[i] = result if isinstance(result, Tokens) else PairError(*result)
            bar.update()
            if cache is None or (key := named[i]) is None or not isinstance(result, Tokens):
                continue
            fresh[key] = result
            if len(fresh) >= PAIRS or time.monotonic() - written > SECONDS:
                cache.write(reader, fresh)
                fresh, written = {}, time.monotonic()
    finally:
        bar.close()
        if cache is not None and fresh:
            cache.write(reader, fresh)
            cache.trim()
    return found  # type: ignore[return-value]


def _workers(pairs: int, videos: bool, processes: int) -> int:
    """How many processes read beside this one: none for so few pairs that starting them takes longer."""
    enough = pairs // (16 if videos else 500)
    cores = (os.cpu_count() or 1) // processes
    return min(cores, 16, enough) if cores > 1 and enough > 1 else 0


def _as_it_is(value: Any) -> Any:
    return value


class _Looks(Dataset[Any]):
    """Tokens of pairs, or what became of them: the parts of a PairError, or a ConfigError."""

    def __init__(self, encoder: PairEncoder, pairs: Sequence[Pair]) -> None:
        self.encoder, self.pairs = encoder, pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Tokens | tuple[str, str, str] | ConfigError:
        try:
            return self.encoder.tokens(self.pairs[index])
        except PairError as error:
            return error.pair, error.reason, error.detail
        except ConfigError as error:
            return error
