"""Pairs → token ids and visual input, checked against the limits before training starts.

    pair + frames → EncodedPair(prompt ids with visual placeholders, vision, chosen ids, rejected ids)

Nothing is ever cut: a pair whose answer, end of sequence or visual tokens do not fit is dropped as a whole, with a reason
that is counted and shown. `PairDataset` looks at every pair once at the start; what fits in `cache_bytes` it keeps encoded
in memory, the rest is decoded again each time it is asked for. Of the rest no more than the first frame is decoded at the start:
a video that turns out to be broken further on costs its pair, not the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor
from torch.utils.data import Dataset

from synpo.config import ConfigError
from synpo.data.features import VisionCache
from synpo.model.adapter import CaptionModel, Prompt
from synpo.model.chat import conversation
from synpo.model.vision import Vision
from synpo.progress import Bar
from synpo.records import Pair, record_id
from synpo.video import FrameSampling, VideoError, VideoInfo, probe, read_frames, resolve_video

STAND_INS = 8  # pairs in a row that may fail to decode while training before that is an error


class PairError(ValueError):
    """A pair that cannot be trained on. `reason` is one of a few fixed phrases, `detail` says what was found."""

    def __init__(self, pair: str, reason: str, detail: str) -> None:
        super().__init__(f"pair {pair}: {reason}: {detail}")
        self.pair, self.reason, self.detail = pair, reason, detail


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

    def encode(self, pair: Pair) -> EncodedPair:
        """Decode the video and tokenize. Raises PairError if the pair cannot be used, ConfigError if no video can."""
        self._check_texts(pair)
        if pair.video is None:
            return self._build(pair, self._prompt(pair, None))
        path, info = self._locate(pair)
        if self.features is None:
            return self._build(pair, self._look(pair, path, info.duration))
        try:
            key = self.features.key(path, self.sampling.times(0.0, info.duration))
        except OSError as error:
            raise PairError(pair.id, "video unreadable", f"{path}: {error.strerror}") from error
        if (vision := self.features.read(key)) is not None:
            return self._build(pair, Prompt(self._blank(pair, info).input_ids, vision))
        prompt = self._look(pair, path, info.duration)
        return self._build(pair, Prompt(prompt.input_ids, self.features.make(key, prompt.vision)))

    def check(self, pair: Pair) -> EncodedPair:
        """As `encode` without pixels: of the video only its packets are read.

        Where features are kept, they are made now.
        """
        if pair.video is None or self.features is not None:
            return self.encode(pair)
        self._check_texts(pair)
        return self._build(pair, self._blank(pair, self._locate(pair)[1]))

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

    def lengths(self, pair: EncodedPair) -> Lengths:
        visual = int(torch.isin(pair.prompt, torch.tensor(self._placeholders, dtype=torch.long)).sum())
        return Lengths(visual, len(pair.prompt) - visual, len(pair.chosen), len(pair.rejected))

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

    def _build(self, pair: Pair, prompt: Prompt) -> EncodedPair:
        chosen, rejected = self._answer(pair, "chosen"), self._answer(pair, "rejected")
        answer = max(len(chosen), len(rejected))
        if self.max_completion_length is not None and answer > self.max_completion_length:
            raise PairError(
                pair.id, "answer too long", f"{answer} tokens, max_completion_length is {self.max_completion_length}"
            )
        if len(prompt.input_ids) + answer > self.max_length:
            raise PairError(
                pair.id,
                "prompt and answer too long",
                f"{len(prompt.input_ids)} + {answer} tokens, max_length is {self.max_length}; "
                "raise it or show fewer frames",
            )
        return EncodedPair(pair.id, prompt.input_ids, chosen, rejected, prompt.vision)


class PairDataset(Dataset[EncodedPair]):
    """The usable ones of `pairs`, encoded on demand; all are looked at once when it is built.

    Attributes:
        pairs: the pairs kept, in their order; lengths: their tokens.
        dropped: why each of the others was not.

    Raises ValueError when no pair is left.
    """

    def __init__(
        self, encoder: PairEncoder, pairs: Sequence[Pair], *, cache_bytes: int = 1 << 30, progress: bool = True
    ) -> None:
        self.encoder = encoder
        self.pairs: list[Pair] = []
        self.lengths: list[Lengths] = []
        self.dropped: list[PairError] = []
        self._cache: dict[int, EncodedPair] = {}
        room = cache_bytes
        seen: set[str] = set()
        for pair in Bar(pairs, desc="reading pairs", unit="pair", disable=not progress):
            try:
                if pair.id in seen:
                    raise PairError(pair.id, "id twice", "an earlier pair has the same id")
                seen.add(pair.id)
                if room > 0:
                    encoded = encoder.encode(pair)
                    room -= encoded.nbytes
                    self._cache[len(self.pairs)] = encoded
                else:
                    encoded = encoder.check(pair)
            except PairError as error:
                self.dropped.append(error)
            else:
                self.pairs.append(pair)
                self.lengths.append(encoder.lengths(encoded))
        if not self.pairs:
            reasons = "; ".join(f"{count} {reason} (e.g. {example})" for reason, count, example in self.reasons())
            raise ValueError(f"none of the {len(pairs)} pairs can be used: {reasons}")

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def in_memory(self) -> bool:
        """Whether no pair has to be decoded again."""
        return len(self._cache) == len(self)

    def __iter__(self) -> Iterator[EncodedPair]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> EncodedPair:
        """The encoded pair; where its video could be opened at the start and cannot be decoded now, the next that can be.

        Raises VideoError when `STAND_INS` pairs in a row cannot be: then it is the folder that is gone.
        """
        index %= len(self)
        if index in self._cache:
            return self._cache[index]
        failed: list[PairError] = []
        for step in range(min(STAND_INS, len(self))):
            place = (index + step) % len(self)
            try:
                found = self._cache[place] if place in self._cache else self.encoder.encode(self.pairs[place])
            except PairError as error:
                failed.append(error)
            else:
                return replace(found, instead=f"{failed[0]}; pair {found.id} stands in for it") if failed else found
        raise VideoError(
            f"{len(failed)} pairs in a row cannot be read any more, the first: {failed[0]}. Is the disk gone?"
        )

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
