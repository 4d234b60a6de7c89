"""Which GPU trains what: models that people train (architectures.py), by way of training, as `synpo plan --fit` estimates it.

    python -m bench.fit [--models "Llama-3 8B" ...] [--frames 8] [--answer 300] [--rank 16] [--device cuda] [--seconds 200]
                        [--out bench/results/fit]

Pairs have a video of so many frames (none for a text model, whose prompts have 2,048 tokens in its place), a question of 40
tokens and two answers; LoRA of that rank on every projection. On a machine without a GPU that is all, and the table says so.

On a GPU rows are confirmed, the largest first, as long as the seconds last: the model with random weights, in bfloat16 or in 4
bits (bitsandbytes), two steps of one pair through synpo's objective and AdamW as a run would choose them, the second timed; the
peak of all tensors beside the estimate. The vision tower is there and not run: words stand for what it saw. TRL's DPOTrainer at
its defaults follows for models of text; it takes no pairs with videos. Prints a table in Markdown, writes OUT.json and OUT.csv.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from bench import measure  # before torch

import torch  # isort: skip
from peft import get_peft_model  # isort: skip
from torch import Tensor  # isort: skip

from bench import report, steps  # isort: skip
from bench.architectures import ARCHITECTURES, Architecture  # isort: skip
from synpo.data.collate import PairCollator  # isort: skip
from synpo.data.tokenize import EncodedPair, Lengths  # isort: skip
from synpo.model import liger  # isort: skip
from synpo.model.adapter import CaptionModel  # isort: skip
from synpo.model.lora_linear import fuse  # isort: skip
from synpo.model.quantize import quantizable  # isort: skip
from synpo.model.tiny import byte_tokenizer  # isort: skip
from synpo.train.choices import half  # isort: skip
from synpo.train.fit import SIZES, ways  # isort: skip
from synpo.train.layers import prepare  # isort: skip
from synpo.train.memory import RESERVE  # isort: skip
from synpo.train.objective import PairObjective  # isort: skip

QUESTION, TEXT = 40, 2048


@dataclass(frozen=True)
class Row:
    """One model and way; memory in GiB without the reserve that `synpo plan` adds; pairs at a time on a GPU of each size."""

    model: str
    way: str
    quantization: str
    checkpointing: bool
    frames: int
    tokens: int
    plan_gib: float | None
    largest: dict[str, int]
    status: str = "estimated"  # measured, failed
    reason: str = ""
    peak_gib: float | None = None
    pairs_per_second: float | None = None


def lengths_of(architecture: Architecture, frames: int, answer: int) -> Lengths:
    visual = architecture.visual(frames)
    return Lengths(visual, QUESTION if visual else TEXT, answer, answer)


def estimated(architecture: Architecture, frames: int, answer: int, rank: int) -> list[Row]:
    """Every way to train a model, as a GPU with liger-kernel would."""
    with torch.device("meta"):
        model = get_peft_model(architecture.skeleton(), adapter(architecture, rank))
    fuse(model)
    liger.stand_in(model.get_base_model().get_decoder())
    lengths = lengths_of(architecture, frames, answer)
    return [
        Row(
            architecture.name,
            way.name,
            way.quantization,
            way.checkpointing,
            frames if lengths.visual else 0,
            lengths.shared,
            (way.one - RESERVE) / 2**30,
            way.largest,
        )
        for way in ways(model, lengths)
    ]


def adapter(architecture: Architecture, rank: int) -> Any:
    """LoRA on the projections of the language model, not of a tower that calls its own the same."""
    found = steps.lora(rank)
    tower = r"(?!.*(visual|vision))" if architecture.visual(2) else ""
    found.target_modules = rf"{tower}.*\.(q|k|v|o|gate|up|down)_proj"
    return found


def built(architecture: Architecture, quantization: str, device: torch.device) -> Any:
    """The model with random weights, those of the language model's layers in 4 bits if asked."""
    torch.manual_seed(0)
    with device:
        model = architecture.skeleton(device=device)
    if quantization == "nf4":
        import bitsandbytes as bnb

        for name in quantizable(model):
            old = model.get_submodule(name)
            new = bnb.nn.Linear4bit(
                old.in_features,
                old.out_features,
                bias=old.bias is not None,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
                device=device,
            )
            new.weight = bnb.nn.Params4bit(old.weight.data.cpu(), requires_grad=False, quant_type="nf4").to(device)
            new.bias = old.bias
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new)
        model.is_loaded_in_4bit = True
    return model.eval().requires_grad_(False)


def ours(row: Row, answer: int, rank: int, device: torch.device) -> steps.Step:
    """One pair through our objective, as a run on this device would choose it."""
    architecture = ARCHITECTURES[row.model]
    model = get_peft_model(built(architecture, row.quantization, device), adapter(architecture, rank))
    lm = CaptionModel(model, byte_tokenizer(), None)
    args = steps.settled(lm, device, activation_checkpointing=row.checkpointing)
    prepare(lm, args)
    steps.checkpoint(model, row.checkpointing)
    model.train()
    size = architecture.config().get_text_config().vocab_size - 8
    lengths = lengths_of(architecture, row.frames, answer)
    ids = torch.randint(300, size, (lengths.shared,), generator=torch.Generator().manual_seed(0))
    pair = EncodedPair("pair", *ids.split([lengths.prompt, answer, answer]), {})
    collated = PairCollator(lm.pad_token_id)([pair])
    batch: Any = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in collated.items()}
    batch["lengths"] = collated["lengths"]
    objective = PairObjective(lm, "synpo", {})

    def loss() -> Tensor:
        with steps.autocast(device, half(args)):
            return objective(model, batch).loss

    return steps.step_of(loss, model)


def trl(architecture: Architecture, answer: int, rank: int, device: torch.device) -> steps.Step:
    """The same pair through TRL's DPOTrainer at its defaults."""
    lengths = lengths_of(architecture, 0, answer)
    generator = torch.Generator().manual_seed(0)
    size = architecture.config().vocab_size
    tokens = torch.randint(300, size, (2, lengths.prompt + answer), generator=generator)
    model = built(architecture, "none", device)
    return steps.trl_step(model, tokens, lengths.prompt, device, adapter(architecture, rank))


def confirmed(row: Row, make: Any, device: torch.device) -> Row:
    """The row with what two steps took; whatever they raise is its reason."""
    try:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        step = make()
        step()
        seconds = measure.Stopwatch(device)(step) / 1e3
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
        return replace(row, status="measured", peak_gib=peak, pairs_per_second=1 / seconds)
    except Exception as error:  # out of memory, or a package that is absent
        return replace(row, status="failed", reason=report.reason_of(error))


def markdown(rows: list[Row]) -> str:
    """Models by ways; a cell says how many pairs fit at a time."""
    lines = ["| model, tokens of a pair | way | one pair, GiB | " + " | ".join(SIZES) + " | peak, GiB | pairs/s |"]
    lines.append("|---" * (5 + len(SIZES)) + "|")
    for row in rows:
        plan, peak = ("-" if gib is None else f"{gib:.1f}" for gib in (row.plan_gib, row.peak_gib))
        speed = "-" if row.pairs_per_second is None else f"{row.pairs_per_second:.2f}"
        cells = [str(n or "-") for n in row.largest.values()] or ["" for _ in SIZES]
        model = f"{row.model}, {row.tokens:,}"
        lines.append(f"| {model} | {row.way} | {plan} | {' | '.join(cells)} | {peak} | {speed} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", metavar="NAME", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--frames", type=int, default=8, help="frames of a video (8)")
    parser.add_argument("--answer", type=int, default=300, help="tokens of each answer (300)")
    parser.add_argument("--rank", type=int, default=16, help="rank of LoRA (16)")
    parser.add_argument("--device", help="cuda where there is one; cpu estimates alone")
    parser.add_argument("--seconds", type=float, default=200.0, help="begin no row on a GPU after so many (200)")
    parser.add_argument("--out", type=Path, help="path without suffix (bench/results/<date>_<chip>_fit)")
    options = parser.parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    facts, begun = measure.machine(device), time.monotonic()
    chosen = [ARCHITECTURES[name] for name in options.models]
    rows = [row for a in chosen for row in estimated(a, options.frames, options.answer, options.rank)]
    out = options.out or Path(__file__).parent / "results" / f"{facts['date']}_{measure.chip_slug(device)}_fit"
    if device.type == "cuda":
        for i in sorted(range(len(rows)), key=lambda i: -(rows[i].plan_gib or 0.0)):
            if time.monotonic() - begun > options.seconds:
                break
            rows[i] = confirmed(rows[i], partial(ours, rows[i], options.answer, options.rank, device), device)
            print(f"{rows[i].model}, {rows[i].way}: {rows[i].status} {rows[i].reason}", file=sys.stderr, flush=True)
            report.write(out, facts, [asdict(row) for row in rows], [])
        for architecture in chosen:
            if architecture.visual(2) or time.monotonic() - begun > options.seconds:
                continue
            lengths = lengths_of(architecture, 0, options.answer)
            blank = Row(architecture.name, "TRL's DPO", "none", True, 0, lengths.shared, None, {})
            rows.append(confirmed(blank, partial(trl, architecture, options.answer, options.rank, device), device))
    said = "confirmed where a peak stands" if device.type == "cuda" else "estimated: no GPU has confirmed it"
    print(f"pairs at a time, LoRA of rank {options.rank}, {options.frames} frames; {said}\n\n{markdown(rows)}")
    report.write(out, facts, [asdict(row) for row in rows], [])
    print(f"\nwritten: {out}.json, .csv")
    return int(any(row.status == "failed" and row.way != "TRL's DPO" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
