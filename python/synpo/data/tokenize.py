"""Pairs → token ids and visual input, checked against the limits before training starts.

    pair + frames → EncodedPair(prompt ids with visual placeholders, vision, chosen ids, rejected ids)

Nothing is ever cut: a pair whose answer, end of sequence or visual tokens do not fit is dropped as a whole, with a reason
that is counted and shown. `PairDataset` knows the tokens of every pair from the start (reading.py). Of a video no more than the
packets and the first frame are read then; it is decoded when its pair is first asked for, and what fits in `cache_bytes` stays
in memory. A video that turns out to be broken further on costs its pair, not the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from synpo.config import ConfigError
from synpo.data.features import READING, VisionCache
from synpo.data.reading import PairError, TokenCache, Tokens, read_tokens, reader_of, stamp
from synpo.model.adapter import CaptionModel, Prompt
from synpo.model.chat import conversation
from synpo.model.vision import Vision
from synpo.progress import Bar
from synpo.records import Pair, record_id
from synpo.video import FrameSampling, VideoError, VideoInfo, probe, read_frames, resolve_video

STAND_INS = 8  # pairs in a row that may fail to decode while training before that is an error


@dataclass(frozen=True)
class EncodedPair:
    """One pair as ids: prompt (P,), chosen (C,), rejected (R,), all int64; the answers end as the chat template ends a turn.

    `instead` says which pair it stands in for, and why.
    """

    id: str
    prompt: Tensor
    chosen: Tensor
    rejected: Tensor
    vision: Vision
    instead: str = ""

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.prompt, self.chosen, self.rejected, *self.vision.values()))


@dataclass(frozen=True)
class Lengths:
    """Tokens of one pair: visual ones and text of the prompt, the two answers with their ends."""

    visual: int
    text: int
    chosen: int
    rejected: int

    @property
    def prompt(self) -> int:
        return self.visual + self.text

    @property
    def shared(self) -> int:
        """Tokens of the pair where its prompt is there once."""
        return self.prompt + self.chosen + self.rejected


class PairEncoder:
    """Encodes pairs for one model.

    Args:
        lm: the model's tokenizer and vision side; its weights are used for `features` alone.
        videos: folder that the pairs' video paths are relative to; None when no pair has a video.
        sampling: which frames of a video are shown.
        max_length: most tokens of prompt (visual ones included) plus answer; None: the model's own context.
        max_completion_length: most tokens of an answer with its end of sequence; None: no limit of its own.
        features: where visual features are kept; None: pairs hold pixels, and the tower runs in training.
    """

    def __init__(
        self,
        lm: CaptionModel,
        videos: Path | None = None,
        sampling: FrameSampling | None = None,
        max_length: int | None = None,
        max_completion_length: int | None = None,
        features: VisionCache | None = None,
    ) -> None:
        self.lm, self.videos, self.sampling = lm, videos, sampling or FrameSampling()
        context = getattr(lm.base.config.get_text_config(), "max_position_embeddings", None)
        self.max_length = max_length or context or 1 << 30
        self.max_completion_length = max_completion_length
        self.features = features
        self._placeholders = sorted(lm.placeholder_ids)
        self._checked: dict[tuple[str, torch.Size, float | None], Prompt] = {}
        self._tells_time: bool | None = None

    def encode(self, pair: Pair, tokens: Tokens | None = None) -> EncodedPair:
        """Decode the video and tokenize; `tokens`: what is known already.

        Raises PairError if the pair cannot be used, ConfigError if no video can.
        """
        if pair.video is None:
            return self.fitted(pair, tokens or self.tokens(pair))
        if tokens is None:
            self._check_texts(pair)
        path, info = self._locate(pair)
        if self.features is None:
            prompt = self._look(pair, path, info.duration)
            return self.fitted(pair, self._with_answers(pair, prompt, tokens), prompt.vision)
        try:
            key = self.features.key(path, self.sampling.times(0.0, info.duration))
        except OSError as error:
            raise PairError(pair.id, "video unreadable", f"{path}: {error.strerror}") from error
        if (vision := self.features.read(key)) is None:
            vision = self.features.make(key, self._look(pair, path, info.duration).vision)
        return self.fitted(pair, self._with_answers(pair, self._blank(pair, info), tokens), vision)

    def tokens(self, pair: Pair) -> Tokens:
        """The ids alone, however many: of a video only its packets are read. Raises as `encode`, but for limits."""
        self._check_texts(pair)
        if pair.video is None:
            return self._with_answers(pair, self._prompt(pair, None))
        return self._with_answers(pair, self._blank(pair, self._locate(pair)[1]))

    def check(self, pair: Pair) -> EncodedPair:
        """As `encode` without pixels."""
        return self.fitted(pair, self.tokens(pair))

    def key(self, pair: Pair) -> str | None:
        """Hash of all of a pair that `tokens` depends on; None where its video is not there."""
        try:
            video = pair.video and stamp(resolve_video(self.videos or Path(), pair.video))
        except (VideoError, OSError):
            return None
        return record_id(pair.prompt, pair.chosen, pair.rejected, video)

    @cached_property
    def reader(self) -> str:
        """Hash of all else that `tokens` depends on."""
        return record_id(reader_of(self.lm), READING, self.sampling)

    def _look(self, pair: Pair, path: Path, seconds: float) -> Prompt:
        """The prompt with the pixels of its video."""
        try:
            return self._prompt(pair, read_frames(path, self.sampling.times(0.0, seconds)), seconds)
        except VideoError as error:
            raise PairError(pair.id, "video unreadable", str(error)) from error

    def _blank(self, pair: Pair, info: VideoInfo) -> Prompt:
        """The prompt's ids alone, which depend on the number and the size of the frames, and with some models on their times."""
        count, seconds = len(self.sampling.times(0.0, info.duration)), info.duration
        blank = torch.zeros(1, dtype=torch.uint8).expand(count, 3, info.height, info.width)
        if self._tells_time is None:
            once, later = (self._prompt(pair, blank, s).input_ids for s in (seconds, 100 * seconds))
            self._tells_time = not torch.equal(once, later)
        key = (record_id(pair.prompt), blank.shape, seconds if self._tells_time else None)
        if key not in self._checked:
            self._checked[key] = Prompt(self._prompt(pair, blank, seconds).input_ids, {})
        return self._checked[key]

    def lengths(self, tokens: Tokens) -> Lengths:
        visual = int(np.isin(tokens.prompt, self._placeholders).sum())
        return Lengths(visual, len(tokens.prompt) - visual, len(tokens.chosen), len(tokens.rejected))

    def _check_texts(self, pair: Pair) -> None:
        """Raise PairError for an answer that is empty or not different, or a text with the model's visual placeholder."""
        for side in ("chosen", "rejected"):
            if not getattr(pair, side).strip():
                raise PairError(pair.id, f"{side} answer empty", "no text")
        if pair.chosen.strip() == pair.rejected.strip():
            raise PairError(pair.id, "chosen equals rejected", pair.chosen.strip()[:80])
        texts = [(message["content"], "prompt unusable") for message in conversation(pair.prompt)]
        texts += [(pair.chosen, "chosen answer unusable"), (pair.rejected, "rejected answer unusable")]
        for text, reason in texts if self._placeholders else ():
            ids = self.lm.tokenizer(text, add_special_tokens=False).input_ids
            if stray := set(ids).intersection(self._placeholders):
                token = self.lm.tokenizer.convert_ids_to_tokens(min(stray))
                raise PairError(pair.id, reason, f"it contains {token}, which stands for what the model sees")

    def _locate(self, pair: Pair) -> tuple[Path, VideoInfo]:
        """The pair's video file, and what it holds."""
        assert pair.video is not None
        if not self.lm.sees_video:
            raise ConfigError(
                f"pair {pair.id} has a video but {type(self.lm.base).__name__} is a text model; use a video model"
            )
        if self.videos is None:
            raise ConfigError(f"pair {pair.id} has the video {pair.video}; --videos should name the folder it is in")
        try:
            path = resolve_video(self.videos, pair.video)
        except VideoError as error:
            raise PairError(pair.id, "video missing", str(error)) from error
        try:
            return path, probe(path)
        except VideoError as error:
            raise PairError(pair.id, "video unreadable", str(error)) from error

    def _prompt(self, pair: Pair, frames: Tensor | None, seconds: float | None = None) -> Prompt:
        try:
            return self.lm.prompt(pair.prompt, frames, seconds=seconds)
        except ValueError as error:
            raise PairError(pair.id, "prompt unusable", str(error)) from error

    def _answer(self, pair: Pair, side: str) -> Tensor:
        try:
            return self.lm.completion(getattr(pair, side), pair.prompt)
        except ValueError as error:
            raise PairError(pair.id, f"{side} answer unusable", str(error)) from error

    def _with_answers(self, pair: Pair, prompt: Prompt, tokens: Tokens | None = None) -> Tokens:
        """Tokens of a pair whose prompt is known; `tokens`: whose answers are, too."""
        ids = prompt.input_ids.numpy().astype(np.int32)
        if tokens is not None:
            return replace(tokens, prompt=ids)
        chosen, rejected = (self._answer(pair, side).numpy().astype(np.int32) for side in ("chosen", "rejected"))
        return Tokens(ids, chosen, rejected)

    def fitted(self, pair: Pair, tokens: Tokens, vision: Vision | None = None) -> EncodedPair:
        """The encoded pair. Raises PairError where it is longer than the limits."""
        answer = max(len(tokens.chosen), len(tokens.rejected))
        if self.max_completion_length is not None and answer > self.max_completion_length:
            raise PairError(
                pair.id, "answer too long", f"{answer} tokens, max_completion_length is {self.max_completion_length}"
            )
        if len(tokens.prompt) + answer > self.max_length:
            raise PairError(
                pair.id,
                "prompt and answer too long",
                f"{len(tokens.prompt)} + {answer} tokens, max_length is {self.max_length}; raise it or show fewer frames",
            )
        prompt, chosen, rejected = (
            torch.from_numpy(part.astype(np.int64)) for part in (tokens.prompt, tokens.chosen, tokens.rejected)
        )
        return EncodedPair(pair.id, prompt, chosen, rejected, vision or {})


class PairDataset(Dataset[EncodedPair]):
    """The usable ones of `pairs`, encoded on demand; all are looked at once when it is built.

    Args:
        cache_bytes: memory for encoded pairs. cache, processes, progress: as `synpo.data.reading.read_tokens`.

    Attributes:
        pairs: the pairs kept, in their order; lengths: their tokens.
        dropped: why each of the others was not.

    Where the encoder keeps visual features, they are made now. Raises ValueError when no pair is left.
    """

    def __init__(
        self,
        encoder: PairEncoder,
        pairs: Sequence[Pair],
        *,
        cache_bytes: int = 1 << 30,
        cache: TokenCache | None = None,
        processes: int = 1,
        progress: bool = True,
    ) -> None:
        self.encoder = encoder
        self.pairs: list[Pair] = []
        self.lengths: list[Lengths] = []
        self.dropped: list[PairError] = []
        self._tokens: list[Tokens] = []
        self._kept: dict[int, EncodedPair] = {}
        self._room = self.cache_bytes = cache_bytes
        found = read_tokens(encoder, pairs, cache, processes=processes, progress=progress)
        seen: set[str] = set()
        seen_by_tower = progress and encoder.features is not None
        for pair, tokens in Bar(
            list(zip(pairs, found)), desc="visual features", unit="pair", disable=not seen_by_tower
        ):
            try:
                if pair.id in seen:
                    raise PairError(pair.id, "id twice", "an earlier pair has the same id")
                seen.add(pair.id)
                if isinstance(tokens, PairError):
                    raise tokens
                encoder.fitted(pair, tokens)
                if encoder.features is not None:
                    encoder.encode(pair, tokens)
            except PairError as error:
                self.dropped.append(error)
            else:
                self.pairs.append(pair)
                self._tokens.append(tokens)
                self.lengths.append(encoder.lengths(tokens))
        if not self.pairs:
            reasons = "; ".join(f"{count} {reason} (e.g. {example})" for reason, count, example in self.reasons())
            raise ValueError(f"none of the {len(pairs)} pairs can be used: {reasons}")

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def in_memory(self) -> bool:
        """Whether all pairs, were they as large as the first, would stay in memory once they are decoded."""
        return self.cache_bytes > 0 and self[0].nbytes * len(self) <= self.cache_bytes

    def __iter__(self) -> Iterator[EncodedPair]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> EncodedPair:
        """The encoded pair; where its video could be opened at the start and cannot be decoded now, the next that can be.

        Raises VideoError when `STAND_INS` pairs in a row cannot be: then it is the folder that is gone.
        """
        index %= len(self)
        failed: list[PairError] = []
        for step in range(min(STAND_INS, len(self))):
            try:
                found = self._encoded((index + step) % len(self))
            except PairError as error:
                failed.append(error)
            else:
                return replace(found, instead=f"{failed[0]}; pair {found.id} stands in for it") if failed else found
        raise VideoError(
            f"{len(failed)} pairs in a row cannot be read any more, the first: {failed[0]}. Is the disk gone?"
        )

    def _encoded(self, place: int) -> EncodedPair:
        if place in self._kept:
            return self._kept[place]
        found = self.encoder.encode(self.pairs[place], self._tokens[place])
        if self._room > 0 and get_worker_info() is None:  # of what a worker keeps the others know nothing
            self._room -= found.nbytes
            self._kept[place] = found
        return found

    def reasons(self) -> list[tuple[str, int, str]]:
        """(reason, how many pairs it cost, the first of them in words), the most frequent first."""
        counts = Counter(error.reason for error in self.dropped)
        first = {error.reason: str(error) for error in reversed(self.dropped)}
        return [(reason, count, first[reason]) for reason, count in counts.most_common()]

    def table(self) -> Table:
        """The report shown before training: pairs kept, and pairs dropped by reason."""
        table = Table("pairs", "count", "for example", title=f"{len(self.pairs) + len(self.dropped)} preference pairs")
        table.add_row("used", str(len(self.pairs)), "")
        for reason, count, example in self.reasons():
            table.add_row(f"dropped: {reason}", str(count), example)
        return table
