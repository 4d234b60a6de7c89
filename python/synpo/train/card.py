"""The card of what was trained, README.md beside its weights: from what, with which objective, on what, and how it is loaded.

PEFT and transformers write cards of empty headings; this one says what the run knows, and no path of the machine it ran on.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch
import yaml

from synpo.train.diagnostics import ends, steps_of

PAPERS = {
    "synpo": "https://arxiv.org/abs/2506.00835",
    "dpo": "https://arxiv.org/abs/2305.18290",
    "ipo": "https://arxiv.org/abs/2310.12036",
    "simpo": "https://arxiv.org/abs/2405.14734",
    "cpo": "https://arxiv.org/abs/2401.08417",
    "orpo": "https://arxiv.org/abs/2403.07691",
}
VERSIONS = ("synpo", "torch", "transformers", "peft", "accelerate")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
COURSE = {
    "log-likelihood of a chosen token": "synpo/chosen_logp",
    "log-likelihood of a rejected token": "synpo/rejected_logp",
    "share of pairs whose chosen answer is the likelier": "rewards/accuracies",
}


def write_card(folder: Path, trainer: Any) -> None:
    """Write the card of what `trainer`, a SynPOTrainer, has in `folder`, as it is now."""
    (folder / "README.md").write_text(card(trainer), encoding="utf-8")


def card(trainer: Any) -> str:
    """The card as Markdown, with what the hub reads of it in front."""
    lm, loss = trainer.lm, trainer.args.loss_type
    adapter = getattr(lm.model, "active_peft_config", None)
    base = (
        adapter.base_model_name_or_path if adapter is not None else lm.base.config._name_or_path
    ) or "its base model"
    on_hub = bool(HUB_ID.fullmatch(base)) and not os.path.isdir(base)
    name = base if on_hub else Path(base).name
    front: dict[str, Any] = {"base_model": base} if on_hub else {}
    front |= {
        "library_name": "peft" if adapter else "transformers",
        "tags": [*dict.fromkeys(["synpo", "preference-optimization", loss])],
    }
    what = "A LoRA adapter of" if adapter else "Trained from"
    parameters = ", ".join(f"{key} = {value:g}" for key, value in trainer.pair_objective.parameters.items())
    paper = f" ({PAPERS[loss]})" if loss in PAPERS else ""
    here = "" if on_hub else f", of which only the folder's name, `{name}`, is known here"
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {name}, {loss}",
        f"{what} {f'[{name}](https://huggingface.co/{name})' if on_hub else f'a model{here}'}: trained on preference pairs with "
        f"{loss}{paper}{f', {parameters}' if parameters else ''}, by synpo.",
        "## Use\n\n" + _use(lm, name, adapter),
        "## Data\n\n" + _data(trainer),
        "## Training\n\n" + _table(_settings(trainer, adapter)),
        "## What it came to\n\n" + _results(trainer),
        "## Versions\n\n" + _versions(),
    ]
    return "\n\n".join(parts) + "\n"


def _use(lm: Any, name: str, adapter: Any) -> str:
    kind = "AutoModelForImageTextToText" if lm.sees_video else "AutoModelForCausalLM"
    flags = f"--model {name} --adapter FOLDER" if adapter else "--model FOLDER"
    if adapter:
        code = (
            f"from peft import PeftModel\nfrom transformers import {kind}\n\n"
            f'base = {kind}.from_pretrained("{name}", dtype="auto")\nmodel = PeftModel.from_pretrained(base, "FOLDER")\n'
        )
    else:
        code = f'from transformers import {kind}\n\nmodel = {kind}.from_pretrained("FOLDER", dtype="auto")\n'
    captions = f"\n```bash\nsynpo eval {flags} --videos ./videos --output captions\n```\n" if lm.sees_video else ""
    return f"FOLDER is the one this card lies in.\n\n```python\n{code}```\n{captions}".rstrip("\n")


def _data(trainer: Any) -> str:
    dataset, held = trainer.train_dataset, trainer.eval_dataset
    pairs = getattr(dataset, "pairs", ())
    seen = sum(1 for pair in pairs if getattr(pair, "video", None))
    text = f"{len(dataset):,} preference pairs" + (f", {seen:,} of them about a video" if seen else "")
    if isinstance(held, dict):
        text += "".join(f", {len(rows):,} held out as {name}" for name, rows in held.items())
    elif held is not None:
        text += f", {len(held):,} held out"
    left = [f"{count:,} {reason}" for reason, count, _ in getattr(dataset, "reasons", list)()]
    text += f". Left out: {', '.join(left)}." if left else "."
    if trainer.unreadable:
        text += f" {len(trainer.unreadable):,} more could not be read while training."
    return f"{text} As trained: {trainer.lm.chat.describe()}."


def _settings(trainer: Any, adapter: Any) -> dict[str, str]:
    args, lm = trainer.args, trainer.lm
    pairs = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    step = f"{pairs} pairs"
    if getattr(args, "tokens_per_batch", None):
        step = f"micro-batches of at most {args.tokens_per_batch:,} tokens, {args.gradient_accumulation_steps} of them"
    half = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    dtype = str(lm.base.get_input_embeddings().weight.dtype).removeprefix("torch.")
    found = {
        "learning rate": f"{args.learning_rate:g}, {getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)}",
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "optimizer step": step,
        "steps": f"{trainer.state.global_step:,} of {trainer.state.max_steps:,}, epoch {trainer.state.epoch or 0:g}",
        "weights": dtype + (f", products in {half}" if half else ""),
        "seed": str(args.seed),
    }
    if trainer.pair_objective.reference:
        base, start = "the model without the adapter", "the model before the first step"
        found["reference"] = {"base": base, "start": start}[trainer.pair_objective.reference]
    if adapter is not None and hasattr(adapter, "lora_alpha"):
        found["LoRA"] = f"rank {adapter.r}, alpha {adapter.lora_alpha:g}, dropout {adapter.lora_dropout:g}"
    if args.max_length:
        found["longest pair"] = f"{args.max_length:,} tokens"
    return found


def _results(trainer: Any) -> str:
    rows = steps_of(trainer.state.log_history)
    if not rows:
        return "Nothing was logged."
    table: list[tuple[str, ...]] = [("", "first fifth of the steps", "last fifth")]
    table += [(label, *(f"{value:.3f}" for value in ends(rows, key))) for label, key in COURSE.items()]
    text = "\n".join(
        "| " + " | ".join(row) + " |" + ("\n|---|---|---|" if i == 0 else "") for i, row in enumerate(table)
    )
    if evaluated := [row for row in trainer.state.log_history if "eval_loss" in row]:
        text += (
            f"\n\nLoss on held-out pairs: {evaluated[0]['eval_loss']:.4f} first, {evaluated[-1]['eval_loss']:.4f} last."
        )
    return text


def _table(values: dict[str, str]) -> str:
    return "\n".join(["| | |\n|---|---|", *(f"| {name} | {value} |" for name, value in values.items())])


def _versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for package in VERSIONS:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    return f"{', '.join(found)}; trained on {device}."
