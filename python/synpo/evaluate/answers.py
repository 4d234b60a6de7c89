"""`synpo eval --pairs`: how likely a model finds the answers of held-out pairs, and what it answers itself.

    pairs ─ PairEncoder ─┬ log-likelihood of chosen and rejected ─┬→ answers.work.jsonl ─→ answers.jsonl ─┬→ scores.json, tables
                         └ generate, to each prompt once ─────────┘                        (--against) ──┘   report.html

For text models, and for video models where the pairs have videos. Scores of a pair, from the mean log-probabilities a token of
its two answers, the end of the turn counted among their tokens:

    chosen, rejected     those two                         margin     chosen − rejected
    accuracy             1 where the margin is above 0, one half where it is 0

answers.work.jsonl grows pair by pair, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from synpo import terminal
from synpo.config import Config, ConfigError
from synpo.data.pairs import hold_out, load_pairs
from synpo.data.tokenize import EncodedPair, PairEncoder, PairError
from synpo.evaluate.bootstrap import mean_metric
from synpo.evaluate.caption import SELF, made_with
from synpo.evaluate.run import ANSWERS, EvalResult, compare
from synpo.evaluate.scores import Scores, count, some
from synpo.evaluate.show import pair_groups, show
from synpo.folders import own_folder
from synpo.model.adapter import CaptionModel, Prompt, check_paths, load
from synpo.model.fingerprint import fingerprint
from synpo.pipeline.decode import generate
from synpo.progress import Bar
from synpo.records import Kept, Pair, RecordStore, read_records, record_id, write_json, write_records
from synpo.report.frames import strip
from synpo.report.table import print_table
from synpo.train.objective import PairObjective
from synpo.train.sharing import collator_for
from synpo.video import VideoError, video_size


@dataclass(frozen=True)
class Answered(Kept):
    """What a model makes of a pair: the mean log-probability a token of its two answers, and its own answer to the prompt.

    `answer` is None where prompt and eval.sampling.max_new_tokens do not fit the model's context together.
    """

    id: str
    pair: str
    chosen: float
    rejected: float
    chosen_tokens: int
    rejected_tokens: int
    answer: str | None


def answer_pairs(
    lm: CaptionModel, config: Config, videos: Path | None, pairs: Sequence[Pair], store: Path
) -> tuple[dict[str, Answered], list[PairError]]:
    """Look at all `pairs`, skipping those that `store` already holds for this model and these settings.

    Returns:
        pair id → what the model makes of it, in the order of `pairs`; and why others were left out.
    """
    settings = record_id("pair", fingerprint(config.model), config.eval.sampling, config.frames, config.seed)
    records: RecordStore[Answered] = RecordStore(Answered, store)
    keys: dict[str, str] = {}
    problems: list[PairError] = []
    waiting: list[Pair] = []
    for pair in pairs:
        if pair.id in keys:
            problems.append(PairError(pair.id, "id twice", "an earlier pair has the same id"))
            continue
        try:
            size = video_size(videos, pair.video) if videos and pair.video else None
        except VideoError as error:
            problems.append(PairError(pair.id, "video missing", str(error)))
            continue
        keys[pair.id] = record_id(settings, pair, size)
        if keys[pair.id] not in records:
            waiting.append(pair)
    encoder, look = PairEncoder(lm, videos, config.frames), _Look(lm, config)
    look.said = {_prompt_of(p): records[keys[p.id]].answer for p in pairs if keys.get(p.id) in records}
    with Bar(total=len(pairs), initial=len(pairs) - len(waiting), desc="pairs", unit="pair") as bar:
        for first in range(0, len(waiting), config.eval.batch_size):
            batch = waiting[first : first + config.eval.batch_size]
            encoded: list[tuple[Pair, EncodedPair]] = []
            for pair in batch:
                try:
                    encoded.append((pair, encoder.encode(pair)))
                except PairError as error:
                    problems.append(error)
            if encoded:
                records.append(*(Answered(keys[pair.id], pair.id, *row) for pair, row in look(encoded)))
            bar.update(len(batch))
    return {p.id: records[keys[p.id]] for p in pairs if keys.get(p.id) in records}, problems


def _prompt_of(pair: Pair) -> str:
    return record_id(pair.prompt, pair.video)


class _Look:
    """What a model makes of a few pairs at a time. `said` holds its answers: prompt → answer."""

    def __init__(self, lm: CaptionModel, config: Config) -> None:
        self.lm, self.sampling, self.seed = lm, config.eval.sampling, config.seed
        self.collate, self.objective = collator_for(lm), PairObjective(lm, "sft", {})
        self.said: dict[str, str | None] = {}

    def __call__(self, encoded: Sequence[tuple[Pair, EncodedPair]]) -> Iterator[tuple[Pair, tuple[Any, ...]]]:
        """The pairs, each with the values of `Answered` behind its ids."""
        visions = self.lm.encode_vision([e.vision for _, e in encoded])  # once, for likelihoods and answers
        encoded = [(pair, replace(e, vision=vision)) for (pair, e), vision in zip(encoded, visions)]
        batch: Any = self.collate([e for _, e in encoded])
        # lengths stay on the host, which reads them
        moved = {k: v.to(self.lm.device) if isinstance(v, Tensor) and k != "lengths" else v for k, v in batch.items()}
        stats = self.objective.reference_stats(moved)  # type: ignore[arg-type]
        logps, tokens = stats.mean_logps.tolist(), [round(n) for n in stats.tokens.tolist()]
        if broken := [
            pair.id for (pair, _), *both in zip(encoded, *_halves(logps)) if not all(map(math.isfinite, both))
        ]:
            raise FloatingPointError(
                f"{type(self.lm.base).__name__} gives the answers of pairs {some(broken)} log-probabilities that are not finite; "
                "its weights are broken or its dtype is too narrow (try model.dtype float32)"
            )
        self._answer(encoded)
        for (pair, _), *figures in zip(encoded, *_halves(logps), *_halves(tokens)):
            yield pair, (*figures, self.said[_prompt_of(pair)])

    def _answer(self, encoded: Sequence[tuple[Pair, EncodedPair]]) -> None:
        """Answer those prompts that are not answered yet."""
        context = getattr(self.lm.base.config.get_text_config(), "max_position_embeddings", None) or math.inf
        asked: dict[str, Prompt] = {}
        for pair, e in encoded:
            if (key := _prompt_of(pair)) in self.said:
                continue
            if len(e.prompt) + self.sampling.max_new_tokens > context:
                self.said[key] = None
            else:
                asked[key] = Prompt(e.prompt, e.vision)
        if asked:
            seeds = [f"{self.seed} {key}" for key in asked]
            answers = generate(self.lm, list(asked.values()), self.sampling, keys=seeds)
            self.said |= {key: answer.text for key, answer in zip(asked, answers)}


def _halves(values: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """Those of the chosen answers, and those of the rejected."""
    return values[: len(values) // 2], values[len(values) // 2 :]


def pair_scores(found: Mapping[str, Answered]) -> Scores:
    """The scores of one system: pair id → what it makes of it."""
    chosen, rejected = (np.array([getattr(a, side) for a in found.values()]) for side in ("chosen", "rejected"))
    margin = chosen - rejected
    per_pair = {
        "accuracy": np.where(margin == 0, 0.5, margin > 0).astype(np.float64),
        "margin": margin,
        "chosen": chosen,
        "rejected": rejected,
    }
    metrics = {name: mean_metric(values) for name, values in per_pair.items()}
    silent = sum(a.answer is None for a in found.values())
    notes = [f"{count(silent, 'prompt')} too long to be answered in the model's context"] if silent else []
    corpus = {name: metric.value for name, metric in metrics.items()}
    return Scores(list(found), corpus, {name: values.tolist() for name, values in per_pair.items()}, notes, metrics)


def evaluate_pairs(
    config: Config, pairs: Path, videos: Path | None, output: Path, against: Mapping[str, Path] | None = None
) -> EvalResult:
    """Evaluate a model on held-out pairs; what `synpo eval --pairs` does.

    Args:
        pairs: file as `load_pairs` reads it; with train.held_out = N, only those that training with it keeps apart.
        videos: folder the pairs' videos are in, None for text.
        output: folder of answers.jsonl, report.html and scores.json, which says with what and over which pairs it was made.
        against: name → answers.jsonl of earlier evaluations; the first is the baseline of the paired differences.

    Raises:
        ConfigError, RecordError, ValueError: input that cannot be used, found before a model is loaded but for pairs that
            cannot be read and pairs that an earlier evaluation lacks.
        FolderInUse: another run writes to `output`.
    """
    console = terminal.console()
    check_paths(config.model)
    if SELF in (against or {}):
        raise ConfigError(f"--against: {SELF!r} is what this evaluation is called; give the other one another name")
    earlier = {name: _read(name, path) for name, path in (against or {}).items()}
    wanted = load_pairs(pairs, config.pairs.prompt)
    if held_out := config.train.get("held_out"):
        wanted = hold_out(wanted, int(held_out))[1]
    if videos is None and (named := next((p for p in wanted if p.video), None)):
        raise ConfigError(f"pair {named.id} has the video {named.video}; --videos should name the folder it is in")
    with own_folder(output, "--output"):
        lm = load(config.model)
        found, problems = answer_pairs(lm, config, videos, wanted, output / "answers.work.jsonl")
        for problem in problems:
            console.print(f"left out {problem}")
        if not found:
            raise ValueError(f"none of the {len(wanted)} pairs of {pairs} can be used; the lines above say why")
        for name in ("scores.json", "report.html"):  # of earlier answers
            (output / name).unlink(missing_ok=True)
        write_records(output / "answers.jsonl", found.values())
        console.print(f"{count(len(found), 'pair')} in {output / 'answers.jsonl'}")
        systems = {name: _on_the_same(name, others, found) for name, others in earlier.items()} | {SELF: found}
        result = compare(
            {name: pair_scores(each) for name, each in systems.items()},
            {name: {"answered": sum(a.answer is not None for a in each.values())} for name, each in systems.items()},
            ANSWERS,
            seed=config.seed,
            resamples=config.eval.bootstrap,
        )
        run = {"pairs": str(pairs), "left_out": {p.pair: f"{p.reason}: {p.detail}" for p in problems}}
        figures = result.to_json() | {"run": run | made_with(config)}
        page = show(
            output,
            " with ".join(filter(None, [config.model.path, config.model.adapter])),
            result,
            pair_groups(
                result,
                {p.id: p for p in wanted if p.id in found},
                {name: {key: a.answer for key, a in each.items()} for name, each in systems.items()},
                lambda video: strip(videos, video) if videos else None,
            ),
            {"pairs": str(pairs), **({"videos": str(videos)} if videos else {}), "seed": str(config.seed)},
            figures,
        )
        write_json(output / "scores.json", figures)
    for table in result.to_tables():
        print_table(table)
    console.print(f"scores.json and {page}")
    return result


def _read(name: str, path: Path) -> dict[str, Answered]:
    if not path.is_file():
        raise ConfigError(f"--against {name}: {path} is {'a folder' if path.is_dir() else 'not there'}; give the file")
    return {row.pair: row for row in read_records(Answered, path)}


def _on_the_same(name: str, others: Mapping[str, Answered], found: Mapping[str, Answered]) -> dict[str, Answered]:
    """An earlier evaluation's figures on the pairs of this one, in their order."""
    if missing := [key for key in found if key not in others]:
        raise ValueError(
            f"--against {name}: it has nothing on {count(len(missing), 'pair')} ({some(missing)}); evaluate both on the same "
            "pairs"
        )
    return {key: others[key] for key in found}
