"""`synpo train`: a config, a folder of videos and a file of pairs → a LoRA adapter or a model, its log and its pictures.

output/config.json           every setting of the run, resolved
output/train_log.jsonl       one line a logged step
output/checkpoint-<step>/    what a killed run goes on from
output/adapter/              the trained adapter (safetensors), for --adapter
output/model/                in its place with lora: null, the trained model (safetensors), for --model
output/vision/               visual features, with train.cache_vision
output/reference/            what the reference of dpo and ipo said, where it is not run in every step
output/rewards.png, output/gradient_balance.png    drawn again after every evaluation and checkpoint
output/report.html           all of that on one page, with some of the pairs
output/metrics.json          written last: a folder that has it is complete
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import set_seed

from synpo import terminal
from synpo.config import Config, ConfigError
from synpo.data.pairs import load_pairs, videos_of
from synpo.folders import own_folder
from synpo.model.adapter import CaptionModel, check_paths, device_of, load
from synpo.model.gather import is_partitioned, whole_state
from synpo.model.vision import copy_preprocessing
from synpo.records import Pair, read_jsonl, record_id, write_json
from synpo.report.table import print_table
from synpo.text import cleaned
from synpo.train.arguments import SynPOConfig, checked
from synpo.train.card import write_card
from synpo.train.checkpoint import holds_work, last_checkpoint, set_broken_aside, writing
from synpo.train.choices import OPEN, in_words, settle
from synpo.train.diagnostics import read_log, warnings_of
from synpo.train.log import LOG_NAME
from synpo.train.lora import make_trainable
from synpo.train.show import show, summary
from synpo.train.trainer import SynPOTrainer

# May be others when a run goes on: what other commands read, and what does not change what is learnt.
ELSEWHERE = ("config.pairs.", "config.judge.", "config.eval.", "chosen.")
FREE = {
    "config.model.device",
    *(
        f"config.train.{name}"
        for name in ("guard", "save_minutes", "save_total_limit", "cache_gigabytes", "cache_tokens")
    ),
}
FREE |= {f"config.train.{name}" for name in ("disable_tqdm", "report_to", "run_name")}
FREE |= {f"config.train.dataloader_{name}" for name in ("num_workers", "prefetch_factor", "persistent_workers")}
FREE.add("answers")  # `_check_answers` looks at them when the model is there


@dataclass(frozen=True)
class TrainResult:
    """What `train` leaves behind. `adapter` is the folder of what was trained, `metrics` the content of metrics.json."""

    output: Path
    adapter: Path
    log: Path
    plots: dict[str, Path]
    metrics: dict[str, Any]
    warnings: list[str]


def settings(config: Config, output: Path) -> SynPOConfig:
    """SynPOConfig from the `train` section. Raises ConfigError for an unknown key or a value of the wrong type."""
    values = checked(config.train)
    if config.model.device.startswith("cuda:") and config.model.device != "cuda:0":
        raise ConfigError(
            f"model.device: training runs on the first visible GPU, not on {config.model.device}: leave it out and set "
            f"CUDA_VISIBLE_DEVICES={config.model.device.removeprefix('cuda:')} in the environment"
        )
    on_cpu = device_of(config.model.device).type == "cpu"
    if str(values.get("eval_strategy", "no")) != "no" and not values.get("held_out"):
        raise ConfigError(
            "train.eval_strategy: there is nothing to evaluate; set train.held_out to the pairs to keep apart"
        )
    if "per_device_train_batch_size" in values:  # what fits in training fits in evaluation
        values.setdefault("per_device_eval_batch_size", values["per_device_train_batch_size"])
    if config.model.adapter and values.get("reference", "auto") == "auto":  # where its training starts is not its base
        values["reference"] = "start"
    try:
        args = SynPOConfig(output_dir=str(output), seed=config.seed, use_cpu=on_cpu, **values)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"train: {error}") from error
    if args.deepspeed_plugin is not None and "gradient_clipping" not in args.deepspeed_plugin.deepspeed_config:
        raise ConfigError(
            f"train.max_grad_norm = {args.max_grad_norm} would not count: DeepSpeed clips gradients itself, and where its file "
            'has no "gradient_clipping", at 1 or (older releases) not at all; put "gradient_clipping": "auto" into what '
            "train.deepspeed, or accelerate, names"
        )
    return args


def train(config: Config, videos: Path | None, pairs: Path, output: Path, resume: bool = True) -> TrainResult:
    """Train a LoRA adapter on preference pairs, or with lora: null the language model.

    With several processes (torchrun), each calls it; the first one writes.

    Args:
        config: sections model, frames, lora and train are used. videos: folder the pairs' videos are in; None: as `videos_of`.
        pairs: file as `load_pairs` reads it. output: folder to write.
        resume: go on from the last whole checkpoint in `output`, or return at once when it is complete; False: start over.

    Raises:
        ConfigError: a setting cannot be used, or `output` holds a run with other settings that has come to a checkpoint.
        FolderInUse: another run writes to `output`.
        FileNotFoundError, RecordError: the pairs file is not there, or not a file of pairs.
        ValueError: no pair can be used; DivergenceError: the loss is not finite; GuardError: train.guard stopped the run;
            CheckpointError: a checkpoint could not be written.
    """
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output: {output} is a file; name a folder, which is made if it is not there")
    args = settings(config, output)
    check_paths(config.model)
    first = args.process_index == 0
    console = terminal.console(stderr=True, quiet=not first)
    chosen = load_pairs(pairs, config.pairs.prompt)
    videos = videos_of(chosen, pairs, videos)
    wanted = {
        "config": asdict(config),
        "videos": str(videos) if videos else None,
        "pairs": str(pairs),
        "content of the pairs": record_id(*chosen),
        "processes": args.world_size,
        "lora is null": config.lora is None,
    }
    before: dict[str, Any] | None = None
    if resume and (output / "config.json").exists() and holds_work(output):
        before = json.loads((output / "config.json").read_text(encoding="utf-8"))
        _check_same(before, wanted, output)
    if resume and (output / "metrics.json").exists():
        console.print(f"{output} is complete; use --no-resume to train again")
        return _result(output)
    with own_folder(output, "--output") if first else contextlib.nullcontext():
        return _train(config, args, videos, chosen, output, resume, wanted, before, console)


def _train(
    config: Config,
    args: SynPOConfig,
    videos: Path | None,
    chosen: Sequence[Pair],
    output: Path,
    resume: bool,
    wanted: Mapping[str, Any],
    before: Mapping[str, Any] | None,
    console: Console,
) -> TrainResult:
    """`train` in a folder that is this run's alone. config.json will hold `wanted` and more; it held `before`."""
    first = args.process_index == 0
    set_seed(config.seed)
    lm = load(config.model)
    wanted = {**wanted, "answers": lm.chat.describe()}
    if before is not None:
        _check_answers(before, wanted["answers"], lm, output)
    console.print(f"as trained: {wanted['answers']}")
    earlier = None if before is None else before.get("chosen", {})
    wanted = {**wanted, "chosen": {**(earlier or {}), **settle(args, lm, lm.device.type, earlier)}}
    wrapped = make_trainable(lm, config)
    trainer = SynPOTrainer(lm, args, chosen, videos=videos, frames=config.frames)
    dataset: Any = trainer.train_dataset
    trained = f"LoRA on {len(wrapped)} modules" if wrapped else "the whole language model"
    parameters = ", ".join(f"{name} {value:g}" for name, value in trainer.pair_objective.parameters.items())
    console.print(
        f"{args.loss_type}{f' ({parameters})' if parameters else ''} on {len(dataset)} pairs, {trained}, "
        f"{trainable_parameters(lm):,} parameters, "
        f"{in_words(args, lm)}"
    )
    if config.lora is None and lm.head().weight.dtype == torch.bfloat16:
        console.print(
            "warning: bfloat16 weights lose updates below a 256th of their size: better model.dtype = "
            "float32 with train.bf16 = true",
            style="yellow",
        )

    with args.main_process_first(local=False):
        if first:
            if not resume:
                _clear(output)
            write_json(output / "config.json", wanted)
            set_broken_aside(output, say=console.print)
        checkpoint = last_checkpoint(output)
    log = output / LOG_NAME
    if checkpoint is not None:
        console.print(f"going on from {checkpoint}")
    done = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    # where it is spread over processes, all of them put it together
    state: dict[str, Any] | None = None
    if is_partitioned(lm.model):
        state = whole_state(lm.model, keep=first, trained_alone=config.lora is not None)
    elif args.world_size > 1:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if first:
        write_card(_save(lm, config, output, state), trainer)
        trainer.curves.draw()
        rows = read_log(log)
        warnings = warnings_of((row for _, row in read_jsonl(log)), args.loss_type)
        metrics = _metrics(done, trainer, rows, warnings)
        show(output, log, dataset.pairs, videos, json.loads(json.dumps(asdict(config))), metrics)
        write_json(output / "metrics.json", metrics)
        print_table(summary(rows), console)
        for warning in warnings:
            console.print(f"warning: {warning}", style="yellow")
        console.print(f"trained: {_result(output).adapter}; report.html, plots and {LOG_NAME} beside it")
    trainer.accelerator.wait_for_everyone()
    return _result(output)


def _save(lm: CaptionModel, config: Config, output: Path, state: dict[str, Any] | None) -> Path:
    """Write what was trained, into the folder returned; `state` holds its weights where no process has them whole."""
    if config.lora is not None:
        with writing(output / "adapter"):  # LoRA on a head is not that head
            lm.model.save_pretrained(output / "adapter", state_dict=state, save_embedding_layers=False)
        return output / "adapter"
    with writing(output / "model"):
        lm.model.save_pretrained(output / "model", state_dict=state)
        lm.tokenizer.save_pretrained(output / "model")
        copy_preprocessing(os.path.expanduser(config.model.path), config.model.revision, output / "model")
    return output / "model"


def _metrics(
    done: Any,
    trainer: SynPOTrainer,
    rows: Sequence[Mapping[str, Any]],
    warnings: list[str],
) -> dict[str, Any]:
    """The content of metrics.json."""
    args: Any = trainer.args
    dataset: Any = trainer.train_dataset
    unseen: Any = trainer.eval_dataset
    return {
        "loss_type": args.loss_type,
        "loss_parameters": trainer.pair_objective.parameters,
        "steps": done.global_step,
        "pairs": len(dataset),
        "held_out": len(unseen) if unseen else 0,
        "dropped": {reason: count for reason, count, _ in dataset.reasons()},
        "unreadable": sorted(trainer.unreadable),
        "trainable_parameters": trainable_parameters(trainer.lm),
        "seconds": done.metrics["train_runtime"],
        "first": rows[0],
        "last": rows[-1],
        "warnings": warnings,
    }


def trainable_parameters(lm: CaptionModel) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in lm.model.parameters() if p.requires_grad)


def _result(output: Path) -> TrainResult:
    metrics = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    plots = {name: output / f"{name}.png" for name in ("rewards", "gradient_balance")}
    trained = next((output / name for name in ("model", "adapter") if (output / name).is_dir()), output / "adapter")
    return TrainResult(output, trained, output / LOG_NAME, plots, metrics, metrics["warnings"])


def _check_same(old: Mapping[str, Any], new: Mapping[str, Any], output: Path) -> None:
    """Raise ConfigError naming the settings of a run that the folder already holds and that are not those asked for.

    A key that is not there (the run was made before there was one) counts as its default; what was left open, as what the run
    chose, or where it wrote down no choice, as off.
    """

    def flat(value: Any, name: str = "") -> dict[str, Any]:
        if not isinstance(value, Mapping):
            return {name: value}
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{name}.{key}".lstrip(".")).items()}

    trained = {f.name: f.default for f in dataclasses.fields(SynPOConfig) if f.default is not dataclasses.MISSING}
    defaults = flat({"config": asdict(Config()) | {"train": trained}, "processes": 1, "lora is null": False})
    before, now = (defaults | flat(cleaned(json.loads(json.dumps(given)))) for given in (old, new))
    for name in OPEN:
        for values in (before, now):
            if values.get(key := f"config.train.{name}") is None:
                values[key] = old.get("chosen", {}).get(name, False)
    differ = [
        f"{name.removeprefix('config.')} was {before.get(name)!r}, now {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if not (_same(before.get(name), now.get(name)) or name in FREE or name.startswith(ELSEWHERE))
    ]
    if differ:
        raise ConfigError(
            f"{output} holds a run with other settings: {'; '.join(differ)}. Take another --output, or --no-resume to "
            "start over"
        )


def _check_answers(old: Mapping[str, Any], now: str, lm: CaptionModel, output: Path) -> None:
    """Raise ConfigError where the run that the folder holds was trained on other tokens of the same answers.

    Runs of releases that did not say took the bare answer and the tokenizer's end of sequence.
    """
    words = "A cat sits."
    bare = [*lm.tokenizer(words, add_special_tokens=False).input_ids, lm.tokenizer.eos_token_id]
    before = old.get(
        "answers",
        now if lm.completion(words).tolist() == bare else "the bare answer and the tokenizer's end of sequence",
    )
    if before != now:
        raise ConfigError(
            f"{output} holds a run whose answers were trained otherwise: {before}; now {now}. Take another --output, "
            "or --no-resume to start over"
        )


def _same(before: Any, now: Any) -> bool:
    """Whether two values of a setting are equal; numbers may be given as text, as YAML reads 5e-6."""
    try:
        return before == now or float(before) == float(now)
    except (TypeError, ValueError):
        return False


def _clear(output: Path) -> None:
    """Remove what an earlier run left, and nothing else."""
    for folder in [
        *output.glob("checkpoint-*"),
        *output.glob("broken-checkpoint-*"),
        output / "adapter",
        output / "model",
    ]:
        shutil.rmtree(folder, ignore_errors=True)
    for name in ("metrics.json", LOG_NAME, "config.json", "report.html", "rewards.png", "gradient_balance.png"):
        (output / name).unlink(missing_ok=True)
