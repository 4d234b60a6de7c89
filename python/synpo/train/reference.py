"""What the reference model thinks of every answer, computed once before training and kept beside the run.

    folder/reference-<process>.jsonl     one line an answer: its log-probability, and the other statistics of its tokens

An objective with a reference (dpo, ipo) otherwise runs the model twice a step, in every epoch. A killed run goes on where it
was. A line counts for one answer of one pair, down to its ids and pixels, under one set of weights and one precision:
anything else is computed again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from synpo.data.features import checksum
from synpo.data.tokenize import EncodedPair
from synpo.model.adapter import CaptionModel
from synpo.records import RecordStore, read_records, record_id
from synpo_kernels import SequenceStats

STATISTICS = tuple(field.name for field in fields(SequenceStats))


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
        folder: where they are kept. lm: the model whose weights, adapters apart, are the reference.
        process, processes: which share of the pairs this process computes. precision: of the products, where it is not
            that of the weights.
    """

    def __init__(
        self, folder: Path, lm: CaptionModel, process: int = 0, processes: int = 1, precision: str = ""
    ) -> None:
        self.folder, self.process, self.processes = folder, process, processes
        self.model = fingerprint(lm) + precision
        self._known: dict[str, list[Reference]] = {}

    def fill(
        self,
        pairs: Iterable[EncodedPair],
        compute: Callable[[list[EncodedPair]], SequenceStats],
        *,
        batch_size: int,
        wait: Callable[[], None] = lambda: None,
        progress: bool = True,
    ) -> None:
        """Compute what is missing, each process its share, and read what all of them have.

        Args:
            compute: statistics of the 2B answers of B pairs, chosen first. wait: returns when all processes are here.
        """
        store = RecordStore(Reference, self.folder / f"reference-{self.process}.jsonl")
        due: list[EncodedPair] = []
        keys: dict[str, str] = {}
        for index, pair in enumerate(tqdm(pairs, desc="reference", unit="pair", disable=not progress)):
            keys[pair.id] = self._key(pair)
            if index % self.processes == self.process and f"{keys[pair.id]}-rejected" not in store:
                due.append(pair)
            if len(due) == batch_size:
                self._append(store, due, keys, compute)
                due = []
        if due:
            self._append(store, due, keys, compute)
        wait()
        found = {r.id: r for path in self.folder.glob("reference-*.jsonl") for r in read_records(Reference, path)}
        self._known = {name: [found[f"{key}-{side}"] for side in ("chosen", "rejected")] for name, key in keys.items()}

    def holds(self, pair_ids: Sequence[str]) -> bool:
        """Whether all of these pairs are known."""
        return all(name in self._known for name in pair_ids)

    def stats(self, pair_ids: Sequence[str], device: torch.device) -> SequenceStats:
        """Statistics (2B,) of the answers of B pairs, chosen first."""
        rows = [self._known[name][side] for side in (0, 1) for name in pair_ids]
        columns = (torch.tensor([getattr(row, name) for row in rows], device=device) for name in STATISTICS)
        return SequenceStats(*columns)

    def _append(
        self,
        store: RecordStore[Reference],
        pairs: list[EncodedPair],
        keys: dict[str, str],
        compute: Callable[[list[EncodedPair]], SequenceStats],
    ) -> None:
        stats = compute(pairs)
        values = torch.stack([getattr(stats, name) for name in STATISTICS], 1).tolist()
        names = [f"{keys[p.id]}-{side}" for side in ("chosen", "rejected") for p in pairs]
        store.append(*(Reference(name, *row) for name, row in zip(names, values) if name not in store))

    def _key(self, pair: EncodedPair) -> str:
        ids = [part.tolist() for part in (pair.prompt, pair.chosen, pair.rejected)]
        return record_id(pair.id, ids, checksum(pair.vision), self.model)


def fingerprint(lm: CaptionModel) -> str:
    """Hash of the weights that adapters leave alone: of names, shapes, dtypes, sums and sums of squares."""
    digest = hashlib.sha256()
    for name, parameter in lm.base.named_parameters():
        if "lora_" not in name and "modules_to_save" not in name:
            name = name.replace(".base_layer", "").replace(".original_module", "")
            values = parameter.detach().double()
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
            digest.update(f"{values.sum().item()!r} {values.square().sum().item()!r}".encode())
    return digest.hexdigest()


def precompute(trainer: Any) -> ReferenceStore:
    """Run the reference over the training pairs of a `SynPOTrainer`, before anything is trained or sharded."""
    args, objective, pairs = trainer.args, trainer.pair_objective, trainer.train_dataset
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else ""
    folder = Path(args.output_dir) / "reference"
    store = ReferenceStore(folder, trainer.lm, args.process_index, args.world_size, precision)

    def compute(batch: list[EncodedPair]) -> SequenceStats:
        with trainer.compute_loss_context_manager():
            return objective.reference_stats(trainer._prepare_inputs(trainer.data_collator(batch)))

    store.fill(
        (pairs[i] for i in range(len(pairs))),
        compute,
        batch_size=args.per_device_train_batch_size,
        wait=trainer.accelerator.wait_for_everyone,
        progress=not args.disable_tqdm,
    )
    return store
