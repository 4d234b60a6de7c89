"""`synpo plan`: what a training run would do and need, from its config and data, without loading a weight.

    pairs → token counts, what is dropped and why
    config.json of the model → the model on the meta device, its LoRA → parameters, memory by layout, largest micro-batch

Memory is estimated for micro-batches in which every pair is as long as the longest one, for two layouts of a pair:

    padded   two rows, prompt + chosen and prompt + rejected, filled up to the longer one
    shared   one stretch of a row, prompt + chosen + rejected (prefix sharing)

each with and without activation checkpointing. The formulas are in memory.py. Nothing is trained, no weight is read.
"""

from __future__ import annotations

import json
import math
import random
import re
import struct
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from synpo import terminal
from synpo.config import Config, ConfigError, ModelConfig
from synpo.data.batches import TokenBatches
from synpo.data.pairs import hold_out, load_pairs, videos_of
from synpo.data.reading import TokenCache
from synpo.data.tokenize import Lengths, PairDataset, PairEncoder
from synpo.model import liger
from synpo.model.adapter import CaptionModel, check_paths, not_loaded, tokenizer_of, wrap
from synpo.model.chat import conversation
from synpo.model.lora_linear import fuse
from synpo.model.peft_kinds import base_is_kept
from synpo.model.vision import vision_for
from synpo.records import Pair
from synpo.train.arguments import SynPOConfig
from synpo.train.choices import half, in_words, settle
from synpo.train.fit import SIZES, Way, largest_batch, table_of, ways
from synpo.train.lora import make_trainable
from synpo.train.memory import RESERVE, Batch, Memory, MemoryModel
from synpo.train.reference import kind_of
from synpo.train.run import settings
from synpo_kernels import OBJECTIVES

LAYOUTS = ("padded", "shared")
DRAWN, LONGEST = 400, 50  # of many pairs so many are read, drawn by chance, and those with the most text
PARTS: dict[str, Callable[[Lengths], int]] = {
    "visual": lambda n: n.visual,
    "prompt text": lambda n: n.text,
    "chosen": lambda n: n.chosen,
    "rejected": lambda n: n.rejected,
    **{f"pair, {layout}": lambda n, layout=layout: Batch(1, n, layout).tokens for layout in LAYOUTS},  # type: ignore[misc]
}
COMMON_SIZES = ("24GB", "48GB", "80GB")
UNITS = {"": 10**9, "GB": 10**9, "GIB": 2**30, "MB": 10**6, "MIB": 2**20}
HEADER_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Estimate:
    """The memory of one layout, in bytes, and the largest micro-batch in pairs that fits each GPU size (0: none does)."""

    layout: str
    checkpointing: bool
    configured: bool
    micro_batch: int
    memory: Memory
    total: int
    largest: dict[str, int]


@dataclass(frozen=True)
class Plan:
    """What `synpo plan` finds. `tokens` maps a part of a pair to its min, median, p95 and max over the pairs.

    `sample`: how many pairs were looked at, None for all; `used` and `dropped` are of these, and steps are estimated then.
    """

    pairs: int
    sample: int | None
    used: int
    dropped: dict[str, dict[str, Any]]
    tokens: dict[str, dict[str, int]]
    longest: dict[str, Any]
    steps: int
    reference: str
    answers: str
    parameters: int
    trained: int
    modules: int
    dtype: str
    precision: str
    optimizer: str
    estimates: list[Estimate]
    ways: list[Way]


def gpu_bytes(text: str) -> int:
    """Bytes of "24GB", "80GiB" or "24" (GB). Raises ConfigError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    if match is None or match[2].upper() not in UNITS or float(match[1]) == 0:
        raise ConfigError(f"--gpu takes a size like 24GB or 80GiB, got {text!r}")
    return int(float(match[1]) * UNITS[match[2].upper()])


def skeleton(config: ModelConfig) -> CaptionModel:
    """The model of a configuration on the meta device: every shape and dtype, no weight.

    Raises ConfigError as `synpo.model.adapter.load`.
    """
    from peft import PeftConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig

    check_paths(config)
    path = str(Path(config.path).expanduser()) if Path(config.path).expanduser().is_dir() else config.path
    shared: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        described = AutoConfig.from_pretrained(path, **shared)
        tokenizer = tokenizer_of(config, described)
        kind = AutoModelForImageTextToText if getattr(described, "vision_config", None) else AutoModelForCausalLM
        with torch.device("meta"):
            model: Any = kind.from_config(
                described,
                dtype=stored_dtype(path, described) if config.dtype == "auto" else getattr(torch, config.dtype),
                attn_implementation="sdpa",
                trust_remote_code=config.trust_remote_code,
            )
            if config.adapter:
                adapter = PeftConfig.from_pretrained(config.adapter)
                adapter.inference_mode = False
                model = get_peft_model(model, adapter)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(not_loaded(config.path, error)) from error
    base = model.get_base_model() if config.adapter else model
    with suppress(OSError):  # there may be none
        base.generation_config = GenerationConfig.from_pretrained(path, revision=config.revision or "main")
    vision = vision_for(base, tokenizer, path, config.revision, config.trust_remote_code)
    return wrap(config, model, tokenizer, vision)


def stored_dtype(path: str, described: Any) -> torch.dtype:
    """What dtype "auto" means: that of the config, else the first one a safetensors header names, else float32."""
    if described.dtype is not None:
        return described.dtype
    for file in sorted(Path(path).glob("*.safetensors")):
        with open(file, "rb") as stream:
            header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
        for name, entry in header.items():
            if name != "__metadata__" and entry["dtype"] in HEADER_DTYPES:
                return HEADER_DTYPES[entry["dtype"]]
    return torch.float32


def statistics(values: Sequence[int]) -> dict[str, int]:
    ordered = sorted(values)
    at = {"min": 0.0, "median": 0.5, "p95": 0.95, "max": 1.0}
    return {name: ordered[round(share * (len(ordered) - 1))] for name, share in at.items()}


def plan(
    config: Config, videos: Path | None, pairs: Path, gpus: Sequence[str] = (), fit: bool = False, every: bool = False
) -> Plan:
    """Count tokens and estimate memory for training with `config` on the pairs of a file.

    Args:
        config, videos, pairs: as `synpo.train.run.train`.
        gpus: sizes such as "24GB"; none: those of this machine's GPU, or a few common ones.
        fit: look at other ways to train the model, too, and at GPUs of every size (fit.py).
        every: read every pair, not a sample of many.

    Raises:
        ConfigError: a setting or size cannot be used. FileNotFoundError, RecordError, ValueError: as `train`.
    """
    sizes = {name: gpu_bytes(name) for name in gpus or _present() or COMMON_SIZES}
    loaded = load_pairs(pairs, config.pairs.prompt)
    videos = videos_of(loaded, pairs, videos)
    away = config if torch.cuda.is_available() else replace(config, model=replace(config.model, device="cpu"))
    args = settings(away, Path("plan"))
    lm = skeleton(config.model)
    encoder = PairEncoder(lm, videos, config.frames, args.max_length, args.max_completion_length)
    taught = hold_out(loaded, args.held_out)[0]
    drawn = {pair.id for pair in (taught if every else random.Random(0).sample(taught, min(DRAWN, len(taught))))}
    long = {pair.id for pair in sorted(taught, key=_characters)[-LONGEST:]}
    read = [pair for pair in taught if pair.id in drawn or pair.id in long]
    cache = TokenCache() if args.cache_tokens else None
    dataset = PairDataset(encoder, read, cache_bytes=0, cache=cache)
    with torch.device("meta"):
        wrapped = make_trainable(lm, config)
    device = "cpu" if config.model.device == "cpu" else "cuda"
    settle(args, lm, device)
    if args.fused_lora:
        fuse(lm.model)
    if args.use_liger_kernel:
        liger.stand_in(lm.base.get_decoder())
    how: Any = args.activation_checkpointing_kwargs
    model = MemoryModel(
        lm.model,
        optimizer=str(getattr(args.optim, "value", args.optim)),
        device=device,
        autocast=half(args),
        quantization=config.model.quantization,
        loss_type=args.loss_type,
        checkpointing=how,
    )
    used = dataset.lengths
    typical = [n for pair, n in zip(dataset.pairs, used) if pair.id in drawn] or used
    whole = len(used) if len(read) == len(taught) else round(len(taught) * len(typical) / len(drawn))
    chosen_layout = "shared" if getattr(args, "prefix_sharing", False) else "padded"
    micro, batches = args.per_device_train_batch_size, None
    if args.tokens_per_batch is not None:
        batches = batches_of([n.shared for n in typical], args.tokens_per_batch)
        batches = math.ceil(batches * whole / len(typical))
        micro = max(1, args.tokens_per_batch // max(n.shared for n in used))
    estimates = []
    for layout in LAYOUTS:
        worst = max(used, key=lambda lengths: Batch(1, lengths, layout).tokens)
        for checkpointing in (False, True):
            memory = model.step(Batch(micro, worst, layout), checkpointing)
            largest = {n: largest_batch(model, worst, layout, checkpointing, size) for n, size in sizes.items()}
            configured = (layout, checkpointing) == (chosen_layout, args.activation_checkpointing)
            estimates.append(Estimate(layout, checkpointing, configured, micro, memory, memory.total, largest))
    at = max(range(len(used)), key=lambda i: Batch(1, used[i], chosen_layout).tokens)
    if batches is None:
        batches = whole // micro if args.dataloader_drop_last else -(-whole // micro)
    others: list[Way] = []
    if fit:
        worst = max(used, key=lambda lengths: lengths.shared)
        others = ways(
            lm.model,
            worst,
            optimizer=model.optimizer,
            autocast=half(args),
            loss_type=args.loss_type,
            checkpointing=how,
            sizes={name: gpu_bytes(name) for name in gpus} or SIZES,
        )
    windows = -(-batches // args.gradient_accumulation_steps)
    return Plan(
        pairs=len(loaded),
        sample=len(read) if len(read) < len(taught) else None,
        used=len(used),
        dropped={reason: {"count": count, "example": example} for reason, count, example in dataset.reasons()},
        tokens={
            name: statistics([part(n) for n in typical]) | {"max": max(part(n) for n in used)}
            for name, part in PARTS.items()
        },
        longest={"id": dataset.pairs[at].id, "video": dataset.pairs[at].video, **asdict(used[at])},
        steps=args.max_steps if args.max_steps > 0 else math.ceil(windows * args.num_train_epochs),
        reference=_reference(args, lm.model, whole + len(loaded) - len(taught)),
        answers=lm.chat.describe(),
        parameters=sum(p.numel() for p in lm.model.parameters()),
        trained=sum(p.numel() for p in lm.model.parameters() if p.requires_grad),
        modules=len(wrapped),
        dtype=str(lm.base.get_input_embeddings().weight.dtype).removeprefix("torch."),
        precision=in_words(args, lm),
        optimizer=model.optimizer,
        estimates=estimates,
        ways=others,
    )


def _characters(pair: Pair) -> int:
    """How long the texts of a pair are."""
    asked = sum(len(message["content"]) for message in conversation(pair.prompt))
    return asked + len(pair.chosen) + len(pair.rejected)


def batches_of(tokens: Sequence[int], budget: int) -> int:
    try:
        return len(TokenBatches(tokens, budget))
    except ValueError as error:
        raise ConfigError(f"train.tokens_per_batch: {error}; raise it, or lower train.max_length") from error


def _reference(args: SynPOConfig, model: Any, pairs: int) -> str:
    """What the objective compares with, in words; empty where it has no reference."""
    if not OBJECTIVES[args.loss_type].needs_reference:
        return ""
    kind = kind_of(args.reference, base_is_kept(model))
    if kind == "base" and not args.precompute_reference:
        return "the model with its adapter off, run again in every step (train.precompute_reference = true: once)"
    what = "the model with its adapter off" if kind == "base" else "the model as it is before the first step"
    return f"{what}, run once over {pairs} pairs before training and kept on disk: no second model in memory"


def _present() -> tuple[str, ...]:
    if not torch.cuda.is_available():
        return ()
    return (f"{torch.cuda.get_device_properties(0).total_memory >> 20}MiB",)


def show(found: Plan, as_json: bool = False) -> None:
    """Print a plan: tables, or one JSON document."""
    if as_json:
        json.dump(asdict(found), sys.stdout, indent=2)
        print()
        return
    console = terminal.console()
    for table in (_pairs_table(found), _tokens_table(found), _memory_table(found)):
        console.print(table)
    longest = found.longest
    if found.ways:
        tokens = found.tokens["pair, shared"]["max"]
        console.print(table_of(found.ways, f"Which GPU trains what: pairs of {tokens:,} tokens, prompts once"))
    console.print(
        f"longest pair: {longest['id']}" + (f" ({longest['video']})" if longest["video"] else ""),
        f"\ntrained: {found.trained:,} of {found.parameters:,} parameters ({found.precision}),",
        f"LoRA on {found.modules} modules;" if found.modules else "the whole language model;",
        f"{found.steps} steps of {found.optimizer}"
        + (" (its states stay on the host where the GPU is full)" if found.optimizer.startswith("paged") else ""),
        *([f"\nreference: {found.reference}"] if found.reference else []),
        f"\nas trained: {found.answers}",
    )
    console.print(
        f"* as configured; checkp.: with activation checkpointing. Each total holds {_gib(RESERVE)} GiB for the CUDA context "
        "and the allocator. No GPU has confirmed these figures yet.",
    )


def _pairs_table(found: Plan) -> Table:
    table = Table("pairs", "count", "for example", title=f"{found.pairs} preference pairs", title_justify="left")
    table.add_row("used", str(found.used), "")
    for reason, entry in found.dropped.items():
        table.add_row(f"dropped: {reason}", str(entry["count"]), entry["example"])
    if found.sample is not None:
        table.caption = (
            f"of {found.sample:,} that were read: some by chance, and the longest in characters (--all: every one)"
        )
    return table


def _tokens_table(found: Plan) -> Table:
    table = Table("tokens", "min", "median", "p95", "max", title="Tokens of a pair", title_justify="left")
    for name, row in found.tokens.items():
        table.add_row(name, *(f"{value:,}" for value in row.values()))
    return table


def _memory_table(found: Plan) -> Table:
    first = found.estimates[0]
    title = f"Memory in GiB, micro-batch of {first.micro_batch}, every pair as long as the longest"
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for entry in found.estimates:
        name = entry.layout + (" *" if entry.configured else "") + ("\ncheckp." if entry.checkpointing else "")
        table.add_column(name, justify="right", no_wrap=True)
    rows = {
        "weights": lambda m: m.weights,
        "gradients and optimizer": lambda m: m.trained,
        "activations": lambda m: m.activations,
        "gradients in flight": lambda m: m.backward,
        "vision tower (before)": lambda m: m.vision,
        "loss": lambda m: m.loss,
        "(from full logits)": lambda m: m.naive_loss,
    }
    for label, value in rows.items():
        table.add_row(label, *(_gib(value(entry.memory)) for entry in found.estimates))
    table.add_row("total", *(_gib(entry.total) for entry in found.estimates))
    for size in first.largest:
        table.add_row(f"largest micro-batch, {size}", *(str(entry.largest[size]) for entry in found.estimates))
    return table


def _gib(value: int) -> str:
    return f"{value / 2**30:.2f}"
