"""What an objective with a reference (dpo, ipo) compares the model with, computed once before training and kept beside the run.

    base     the model with its adapter off, at any time: run in every step, or stored with train.precompute_reference
    start    the model as it is before the first step, which training overwrites: always stored before that step

    folder/reference-<process>.jsonl     one line an answer: its log-probability, and the other statistics of its tokens

A killed run goes on where it was. A line counts for one answer of one pair, down to its ids and pixels, under one set of
weights, down to their bits, and one precision: anything else is computed again. A run that goes on from a checkpoint no longer
has the model of its start: what is missing then is an error.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader

from synpo.config import ConfigError, suggest
from synpo.data.features import checksum
from synpo.data.tokenize import EncodedPair
from synpo.model.adapter import CaptionModel
from synpo.model.gather import is_partitioned
from synpo.progress import Bar
from synpo.records import RecordStore, read_records, record_id
from synpo.train.lora import adapters_own
from synpo_kernels import SequenceStats

STATISTICS = tuple(field.name for field in fields(SequenceStats))
KINDS = ("auto", "base", "start")


def kind_of(name: str, base: bool) -> str:
    """base or start, for `train.reference` and a model under whose adapter its base is kept or not; auto is base where it is.

    Raises ConfigError for an unknown name, and for a base that is not kept.
    """
    if name not in KINDS:
        raise ConfigError(f"train.reference: unknown reference {name!r}; {suggest(name, KINDS)}")
    if name == "base" and not base:
        raise ConfigError(
            "train.reference: base is the model with its adapter off; of biases that an adapter trains no copy is kept, nor of "
            "weights that it was begun with (PiSSA, OLoRA), or this model has no adapter; set start (the model as it is before "
            "the first step), or train with LoRA"
        )
    return name if name != "auto" else "base" if base else "start"


@dataclass(frozen=True)
class Reference:
    """`SequenceStats` of one answer; `id` names the pair, its content, the weights and the side."""

    id: str
    logps: float
    mean_logps: float
    mean_probs: float
    tokens: float


class ReferenceStore:
    """Statistics of the answers of pairs under a reference model.

    Args:
        folder: where they are kept. model: what names the reference, as `fingerprint`, and the precision of its products.
        process, processes: which share of the pairs this process computes.
    """

    def __init__(self, folder: Path, model: str, process: int = 0, processes: int = 1) -> None:
        self.folder, self.model, self.process, self.processes = folder, model, process, processes
        self._known: dict[str, tuple[Reference, Reference]] = {}

    def fill(
        self,
        pairs: Iterable[EncodedPair],
        compute: Callable[[list[EncodedPair]], SequenceStats] | None,
        *,
        batch_size: int,
        wait: Callable[[], None] = lambda: None,
        progress: bool = True,
    ) -> None:
        """Compute what is missing, each process its share, and read what all of them have.

        Args:
            compute: statistics of the 2B answers of B pairs, chosen first; None where the reference is no more.
            wait: returns when all processes are here.

        Raises:
            ConfigError: something is missing and cannot be computed. ValueError: two pairs have one id, or the reference
                gives a log-probability that is not finite.
        """
        there = self._read().keys()
        store = RecordStore(Reference, self.folder / f"reference-{self.process}.jsonl")
        due: list[EncodedPair] = []
        missing: list[str] = []
        keys: dict[str, str] = {}
        for index, pair in enumerate(Bar(pairs, desc="reference", unit="pair", disable=not progress)):
            key, earlier = self._key(pair), keys.get(pair.id)
            if earlier not in (None, key):
                raise ValueError(
                    f"two different pairs have the id {pair.id}: the reference is kept by id; make them unique"
                )
            keys[pair.id] = key
            if earlier or f"{key}-rejected" in there or f"{key}-rejected" in store:
                continue
            missing.append(pair.id)
            if compute is None or index % self.processes != self.process:
                continue
            due.append(pair)
            if len(due) == batch_size:
                self._append(store, due, keys, compute)
                due = []
        if compute is None and missing:
            raise ConfigError(
                f"the reference of {len(missing)} of {len(keys)} pairs (the first is {missing[0]}) is not in {self.folder}, and "
                "the model it comes from is that of the start of the run: since then the model, a video, the frames, the "
                "precision or the folder changed. Put back what changed, or start over (--no-resume)"
            )
        if compute is not None and due:
            self._append(store, due, keys, compute)
        wait()
        found = self._read()
        self._known = {name: (found[f"{key}-chosen"], found[f"{key}-rejected"]) for name, key in keys.items()}

    def holds(self, pair_ids: Sequence[str]) -> bool:
        """Whether all of these pairs are known."""
        return all(name in self._known for name in pair_ids)

    def stats(self, pair_ids: Sequence[str], device: torch.device) -> SequenceStats:
        """Statistics (2B,) of the answers of B pairs, chosen first."""
        rows = [self._known[name][side] for side in (0, 1) for name in pair_ids]
        table = torch.tensor([[getattr(row, name) for row in rows] for name in STATISTICS])
        return SequenceStats(*table.to(device, non_blocking=True))

    def _read(self) -> dict[str, Reference]:
        """What all processes have written."""
        return {
            r.id: r for path in sorted(self.folder.glob("reference-*.jsonl")) for r in read_records(Reference, path)
        }

    def _append(
        self,
        store: RecordStore[Reference],
        pairs: list[EncodedPair],
        keys: dict[str, str],
        compute: Callable[[list[EncodedPair]], SequenceStats],
    ) -> None:
        stats = compute(pairs)
        values = torch.stack([getattr(stats, name) for name in STATISTICS], 1).tolist()
        for pair, row in zip([*pairs, *pairs], values):
            if not all(map(math.isfinite, row)):
                raise ValueError(
                    f"the reference gives pair {pair.id} log-probabilities that are not finite, before any training; look at "
                    "this pair, or use bfloat16 or float32 (model.dtype, train.bf16) where it is float16"
                )
        names = [f"{keys[p.id]}-{side}" for side in ("chosen", "rejected") for p in pairs]
        store.append(*(Reference(name, *row) for name, row in zip(names, values) if name not in store))

    def _key(self, pair: EncodedPair) -> str:
        ids = [part.tolist() for part in (pair.prompt, pair.chosen, pair.rejected)]
        return record_id(pair.id, ids, checksum(pair.vision), self.model)


def fingerprint(lm: CaptionModel, adapters: bool = False) -> str:
    """Hash of the weights, bit by bit, without those of adapters unless asked: of names, dtypes, shapes and content."""
    digest = hashlib.sha256()
    own = {id(parameter) for parameter in adapters_own(lm.base)}
    for name, parameter in lm.base.named_parameters():
        if adapters or id(parameter) not in own:
            name = re.sub(r"\.(base_layer|original_module|token_adapter)\b", "", name)
            digest.update(f"{name} {parameter.dtype} {checksum({'': parameter})}".encode())
    return digest.hexdigest()


def precompute(trainer: Any, resuming: bool) -> ReferenceStore:
    """Run the reference over the pairs of a `SynPOTrainer`, those it evaluates too, before anything is trained or sharded.

    `resuming`: the checkpoint that the run goes on from is no longer the model of its start, and the model at hand counts
    as that only if it is the one whose statistics are stored.
    """
    args, objective = trainer.args, trainer.pair_objective
    start = objective.reference == "start"
    if is_partitioned(trainer.lm.model):  # its processes would wait for each other: each has pairs of its own
        raise ConfigError(
            "train.precompute_reference: the reference of a model that ZeRO-3 has partitioned cannot be stored; train a new "
            "adapter without it (train.reference = base), or use ZeRO-2 or FSDP"
        )
    if resuming and start and objective.references is not None:  # this process began the run, and has trained since
        model = objective.references.model
    else:
        model = fingerprint(trainer.lm, adapters=start) + ("bf16" if args.bf16 else "fp16" if args.fp16 else "")
    if len(set(gather_object([model]))) > 1:
        raise ConfigError(
            "the processes hold different weights, so that they have no common reference: load the whole model in each of them "
            "(train.fsdp_config.cpu_ram_efficient_loading = false)"
        )
    store = ReferenceStore(Path(args.output_dir) / "reference", model, args.process_index, args.world_size)

    def compute(batch: list[EncodedPair]) -> SequenceStats:
        with trainer.accelerator.autocast():  # which is put around the model's forward when training begins
            return objective.reference_stats(trainer._prepare_inputs(trainer.data_collator(batch)))

    evaluated = trainer.eval_dataset
    evaluated = list(evaluated.values()) if isinstance(evaluated, dict) else [evaluated]
    store.fill(
        (
            pair
            for pairs in (trainer.train_dataset, *evaluated)
            if pairs is not None
            for pair in DataLoader(
                pairs, batch_size=None, num_workers=args.dataloader_num_workers, generator=torch.Generator()
            )
        ),
        None if resuming and start else compute,
        batch_size=args.per_device_train_batch_size,
        wait=trainer.accelerator.wait_for_everyone,
        progress=not args.disable_tqdm,
    )
    return store
