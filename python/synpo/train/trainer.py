"""The training loop: transformers.Trainer with batches of pairs, the fused loss, and a log that tells what the loss does.

    trainer = SynPOTrainer(model, SynPOConfig("run"), train_dataset=rows, processing_class=tokenizer, peft_config=LoraConfig(…))
    trainer.train()

It is used as TRL's trainers are; `synpo train` is made of it (run.py).

Checkpoints, resuming, mixed precision, accumulation and distribution are the Trainer's own. What differs from it:

* the loss of an optimizer step is the mean over its pairs, whatever the accumulation and however full the last window is;
* the objective sees hidden states, never logits (objective.py), and a loss that is not finite stops the run;
* each step's metrics go to `train_log.jsonl` as well, and a resumed run cuts that file back to its checkpoint.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedModel, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from synpo.config import DEFAULT_LOSS, LOSS_PARAMETERS, ConfigError, suggest
from synpo.data.batches import TokenBatches
from synpo.data.collate import PairBatch
from synpo.data.tokenize import EncodedPair
from synpo.records import atomic_path, read_jsonl
from synpo.setting import Range, above, at_least, check, setting
from synpo.train.bar import TrainingBar
from synpo.train.card import write_card
from synpo.train.checkpoint import last_checkpoint, owes_evaluation, writing
from synpo.train.choices import OPEN, half, settle
from synpo.train.given import Data, model_of, name_of, workers
from synpo.train.guard import MODES, Curves, Guard, GuardError
from synpo.train.layers import prepare
from synpo.train.objective import Outcome, PairObjective, parameters_of
from synpo.train.optimizers import check_optimizer
from synpo.train.reference import kind_of, precompute
from synpo.train.repetition import repetition
from synpo.train.saving import Saver
from synpo.train.sharing import collator_for
from synpo.video import FrameSampling

LOG_NAME = "train_log.jsonl"
TRACKERS = ("tensorboard", "wandb", "trackio")


RANGES = {
    "per_device_eval_batch_size": at_least(1),
    "max_grad_norm": at_least(0, "0 is off"),
    "weight_decay": at_least(0),
    "adam_beta1": Range(lambda value: 0 <= value < 1, "from 0 to less than 1"),
    "adam_beta2": Range(lambda value: 0 <= value < 1, "from 0 to less than 1"),
    "adam_epsilon": at_least(0),
    "save_steps": above(0),
    "eval_steps": above(0),
    "eval_delay": at_least(0),
}
"""Of figures of TrainingArguments, which does not look at them."""


class DivergenceError(ValueError):
    """Loss or gradient is not finite. The message names the pairs and the settings to change."""


class MemoryLimitError(ValueError):
    """A step does not fit in the memory of the device. The message names the settings to change."""


@dataclass
class SynPOConfig(TrainingArguments):
    """transformers.TrainingArguments with the paper's schedule (arXiv 2506.00835) as defaults, and the objective.

    32 pairs an optimizer step are 4 at a time, 8 times; with several processes divide the latter. `alpha`, `beta`, `gamma`
    and `weight` are the objective's parameters, None its own defaults (synpo: alpha 30, beta 0.2).
    """

    learning_rate: float = setting(5e-6, "Learning rate after warm-up.", at_least(0))
    lr_scheduler_type: str = setting("linear", "Course of the learning rate: linear, cosine, constant_with_warmup …")
    warmup_steps: float = setting(0.1, "Steps, or below 1 their share, in which the rate rises from 0.", at_least(0))
    num_train_epochs: float = setting(5.0, "Times that every pair is seen.", above(0))
    per_device_train_batch_size: int = setting(4, "Pairs that one device takes at a time.", at_least(1))
    gradient_accumulation_steps: int = setting(8, "Such micro-batches in one optimizer step.", at_least(1))

    loss_type: str = field(default=DEFAULT_LOSS, metadata={"help": "synpo, dpo, ipo, simpo, cpo, orpo or sft."})
    alpha: float | None = field(default=None, metadata={"help": "Sharpness of SynPO's preference term."})
    beta: float | None = field(default=None, metadata={"help": "Weight of SynPO's language reward; β of the others."})
    gamma: float | None = field(default=None, metadata={"help": "SimPO's margin."})
    weight: float | None = field(default=None, metadata={"help": "Weight of CPO's likelihood term."})
    loss_backend: str = field(default="auto", metadata={"help": "Kernels of the loss: auto, chunked or triton."})
    max_length: int | None = setting(
        None, "Most tokens of prompt and answer; longer pairs are dropped, never cut.", at_least(1)
    )
    max_completion_length: int | None = setting(None, "Most tokens of an answer with its end.", at_least(1))
    cache_gigabytes: float = setting(1.0, "Memory for decoded and tokenized pairs.", at_least(0))
    reference: str = field(
        default="auto",
        metadata={
            "help": "What dpo and ipo compare with: base, the model with its adapter off; start, the model as it is before "
            "the first step, run over all pairs then and kept on disk. auto: base with a new adapter; start with lora: null "
            "or model.adapter."
        },
    )
    precompute_reference: bool = field(
        default=False,
        metadata={"help": "Run a reference that is base once before training too, and keep what it says."},
    )
    cache_tokens: bool = field(
        default=True,
        metadata={
            "help": "Keep tokens of pairs on disk for the next start ($XDG_CACHE_HOME/synpo/tokens, at most 2 GiB)."
        },
    )
    cache_vision: bool = field(
        default=False, metadata={"help": "Keep visual features on disk: the tower runs once a video and run."}
    )
    prefix_sharing: bool = field(
        default=True, metadata={"help": "Compute the prompt of a pair once; models that cannot say why."}
    )

    tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "As many pairs a micro-batch as have so many tokens, long beside short; "
            "per_device_train_batch_size does not count then."
        },
    )

    # left open (None), choices.py sees to them
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Products in bfloat16 under autocast. Left open: on a GPU, where the weights are bfloat16."},
    )
    tf32: bool | None = field(
        default=None,
        metadata={"help": "TF32 for products that stay float32. Left open: on a GPU that has it; false: all 24 bits."},
    )
    activation_checkpointing: bool | None = field(
        default=None,
        metadata={"help": "Run layers again in the backward pass. Left open: on a GPU, from a billion parameters on."},
    )
    activation_checkpointing_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "every_n_layers: one of so many layers only; offload: true: what is kept stays in the host's memory."
        },
    )

    use_liger_kernel: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Norms, rotary positions and gated activations of liger-kernel. Left open: on a GPU, where it is installed."
        },
    )
    fused_lora: bool | None = field(
        default=None, metadata={"help": "LoRA layers in fewer passes over their activations. Left open: on a GPU."}
    )

    guard: str = field(
        default="warn", metadata={"help": "off, warn, or stop when negatives dominate or language breaks."}
    )
    held_out: int = setting(0, "Pairs kept from training and evaluated once an epoch.", at_least(0))
    samples: int = setting(4, "Held-out prompts answered greedily at every evaluation.", at_least(0))
    dataloader_num_workers: int | None = setting(  # type: ignore[assignment]
        None,
        "Processes that read pairs. Left open: on a GPU, where the pairs do not fit in memory, up to four.",
        at_least(0),
    )
    sample_tokens: int = setting(64, "Most tokens of such an answer; 0: none is written.", at_least(0))

    logging_steps: float = setting(1, "Steps from one line of the log to the next; below 1 their share.", above(0))
    save_strategy: str = setting("epoch", "When to write a checkpoint: epoch, steps, best or no.")
    save_minutes: float | None = setting(
        2.0,
        "And when the last one is so old, later where writing would take more than a twentieth of the time; null: never so.",
        above(0),
    )
    save_total_limit: int | None = setting(2, "Checkpoints kept, the newest; null: all.", at_least(1))
    report_to: str | list[str] | None = setting("none", "tensorboard, wandb or trackio, which must be installed.")
    use_cache: bool = True  # the loss asks for none itself; the model stays ready to generate
    include_num_input_tokens_seen: str | bool = "non_padding"
    logging_nan_inf_filter: bool = False
    remove_unused_columns: bool = False  # batches hold what the objective reads, not what the model's forward names

    def __post_init__(self) -> None:
        self._check()
        parameters_of(self.loss_type, self.loss_parameters)
        if self.guard not in MODES:
            raise ConfigError(f"train.guard: expected {', '.join(MODES)}, got {self.guard!r}")
        kind_of(self.reference, base=True)
        check_reporters(self.report_to)
        check_optimizer(str(getattr(self.optim, "value", self.optim)))
        if self.deepspeed and importlib.util.find_spec("deepspeed") is None:
            raise ConfigError("train.deepspeed: DeepSpeed is not installed: pip install deepspeed")
        if self.held_out > 0 and str(getattr(self.eval_strategy, "value", self.eval_strategy)) == "no":
            self.eval_strategy, self.eval_on_start = "epoch", True
        if self.gradient_checkpointing and self.activation_checkpointing is None:  # its name in earlier releases
            self.activation_checkpointing = True
        self.activation_checkpointing_kwargs = (
            self.activation_checkpointing_kwargs or self.gradient_checkpointing_kwargs
        )
        self.gradient_checkpointing_kwargs = self.activation_checkpointing_kwargs
        if self.tokens_per_batch is not None and (self.tokens_per_batch < 1 or self.auto_find_batch_size):
            raise ConfigError(
                f"train.tokens_per_batch: expected at least 1, and no train.auto_find_batch_size, got {self.tokens_per_batch}"
            )
        self.left_open = tuple(name for name in OPEN if getattr(self, name) is None)
        self.bf16, self.use_liger_kernel = bool(self.bf16), bool(self.use_liger_kernel)
        self.workers_open = self.dataloader_num_workers is None
        self.dataloader_num_workers = self.dataloader_num_workers or 0
        super().__post_init__()
        self.activation_checkpointing = self.gradient_checkpointing = bool(self.activation_checkpointing)

    @property
    def loss_parameters(self) -> dict[str, float | None]:
        return {name: getattr(self, name) for name in LOSS_PARAMETERS}

    def _check(self) -> None:
        """Raise ConfigError for a figure that is out of range, of TrainingArguments as of our own."""
        try:
            check(self)
        except ValueError as error:
            raise ConfigError(f"train.{error}") from error
        for name, within in RANGES.items():
            if (value := getattr(self, name, None)) is not None and not within.fits(value):
                raise ConfigError(f"train.{name}: expected {within.words}, got {value!r}")


def check_reporters(names: str | list[str] | None) -> None:
    """Raise ConfigError for a tracker in `report_to` that is not installed, before any work."""
    for name in [names] if isinstance(names, str) else names or []:
        if name in TRACKERS and importlib.util.find_spec(name) is None:
            raise ConfigError(f"train.report_to: {name} is not installed: pip install 'synpo[{name}]'")


class SynPOTrainer(Trainer):
    """Trains a model on preference pairs.

    Args:
        model: a causal or image-text-to-text model of transformers, in PEFT or not, or the folder or hub id of one. What
            requires gradients is trained.
        args: the settings; None: SynPOConfig's defaults, in a folder of the model's name.
        train_dataset: rows of pairs, a `datasets.Dataset` or any sequence of mappings, in every form that the lines of a pairs
            file have (`synpo.data.pairs`): prompt, chosen and rejected, as texts or as conversations, and perhaps a video.
        eval_dataset: rows as well, or several by name; None: `args.held_out` of those to train on.
        processing_class: tokenizer or processor; None: those of the folder or hub id that the model comes from.
        peft_config: put this adapter on the model, and train that alone.
        videos: the folder that the videos of rows are in. frames: how many of each are shown; None: `FrameSampling()`.
        options: what `transformers.Trainer` takes beside these: callbacks, optimizers, ….

    Attributes:
        lm: the model with its tokenizer and vision (`synpo.model.adapter.CaptionModel`, which `model` may be, too).

    A pair that cannot be trained on is left out, counted, and shown with its reason.

    Raises:
        ConfigError: `args.reference` is one that the model cannot give, the weights are float16 without train.fp16, or
            `args.fsdp` is set where accelerate does not shard.
        RecordError: a row is not a pair. ValueError: no pair can be used; the model's output head is not one the fused loss
            supports; as `synpo.train.given.model_of`.
    """

    def __init__(
        self,
        model: Any,
        args: SynPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        *,
        videos: str | os.PathLike[str] | None = None,
        frames: FrameSampling | None = None,
        **options: Any,
    ) -> None:
        if args is None:
            args = SynPOConfig(f"{name_of(model)}-SynPO")
        if not isinstance(args, SynPOConfig):
            raise ValueError(f"args: expected a SynPOConfig, got {type(args).__name__}")
        lm = model_of(model, processing_class, peft_config, cpu=args.use_cpu, seed=args.seed)
        settle(args, lm, args.device.type)
        data = Data(lm, args, Path(videos) if videos is not None else None, frames)
        train_dataset, eval_dataset = data.both(train_dataset, eval_dataset)
        args.dataloader_pin_memory &= args.device.type == "cuda"
        if args.workers_open and args.device.type == "cuda":
            args.dataloader_num_workers = workers(train_dataset, args.world_size)
        prepare(lm, args)
        if lm.head().weight.dtype == torch.float16 and not args.fp16:
            raise ConfigError(
                "float16 weights without loss scaling lose most gradients: set train.fp16 = true, or load the model with "
                "model.dtype bfloat16 or float32"
            )
        if args.fp16 and any(p.dtype == torch.float16 and p.requires_grad for p in lm.model.parameters()):
            raise ConfigError(
                "train.fp16 scales the gradients of float32 weights, and those that are trained here are float16: load the model "
                "with model.dtype = float32"
            )
        with torch.autocast(args.device.type, half(args), enabled=half(args) is not None):
            collate: Any = collator_for(lm, args.prefix_sharing)
        objective = PairObjective(lm, args.loss_type, args.loss_parameters, args.loss_backend, args.reference)
        if args.n_gpu > 1:
            args._n_gpu = 1  # one process drives one GPU: DataParallel copies would lose the head's hook
        compiled = args.torch_compile_backend, args.torch_compile_mode
        args.torch_compile_backend = args.torch_compile_mode = (
            None  # its layers are; accelerate would compile the whole model
        )
        super().__init__(
            model=lm.model,
            args=args,
            data_collator=collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **options,
        )
        args.torch_compile_backend, args.torch_compile_mode = compiled
        if args.fsdp and not self.is_fsdp_enabled:  # accelerate.state.AcceleratorState knows it for accelerators alone
            raise ConfigError(
                f"train.fsdp: accelerate shards a model over GPUs only; on {args.device.type} it would train a whole copy in "
                "every process and not say so. Leave train.fsdp out (several processes then train as DDP), or train on GPUs"
            )
        self.lm = lm
        self.pair_objective = objective
        objective.autocast = self.accelerator.autocast
        # `compute_loss` divides by the pairs of the window itself. The first line says so from transformers 5.19 on,
        # the second one before.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self._batches = self._of_tokens(args.tokens_per_batch)
        self._means = {"train": _Means(), "eval": _Means()}
        self.unreadable: set[str] = set()  # what was said of pairs that others stood in for
        self.remove_callback(PrinterCallback)
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(TrainingBar)
        output = Path(str(args.output_dir))
        log = output / LOG_NAME
        self.saver = Saver(args.save_minutes, args.world_size)
        self.guard = Guard(args.loss_type, args.guard, [row for _, row in read_jsonl(log)] if log.exists() else [])
        self.curves = Curves(output, args.loss_type, log)
        for callback in (self.saver, JsonLog(log), self.guard, self.curves):
            self.add_callback(callback)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; True goes on from the last checkpoint that is whole. A reference that is to be stored runs first,
        once over every pair.

        Raises GuardError where `args.guard` stopped the run.
        """
        settings: Any = self.args
        output = Path(str(settings.output_dir))
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_checkpoint(output) or "") or True
        if isinstance(resume_from_checkpoint, str):
            settings.eval_on_start = owes_evaluation(Path(resume_from_checkpoint), output / LOG_NAME, settings)
        kind = self.pair_objective.reference
        if kind == "start" or (kind == "base" and settings.precompute_reference):
            self.pair_objective.references = precompute(self, resuming=bool(resume_from_checkpoint))
        done = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.guard.stopped is not None:
            raise GuardError(
                f"stopped by train.guard at step {done.global_step}: {self.guard.stopped.text} "
                f"{output}/checkpoint-{done.global_step} is saved; --set train.guard=warn goes on from it, other settings want "
                "another --output"
            )
        return done

    def _of_tokens(self, budget: int | None) -> TokenBatches | None:
        """How pairs are put together where micro-batches are as large as their tokens allow."""
        data: Any = self.train_dataset
        if budget is None or data is None:
            return None
        collate: Any = self.data_collator
        if not collate.prefix_sharing:
            raise ConfigError(
                "train.tokens_per_batch counts tokens of packed rows, and here every prompt is computed twice, in rows of its "
                "own: set train.per_device_train_batch_size instead"
            )
        if hasattr(data, "lengths"):
            tokens = [lengths.shared for lengths in data.lengths]
        else:
            tokens = [len(p.prompt) + len(p.chosen) + len(p.rejected) for p in (data[i] for i in range(len(data)))]
        try:
            return TokenBatches(tokens, budget, self.args.data_seed or self.args.seed, self.args.world_size)
        except ValueError as error:
            raise ConfigError(f"train.tokens_per_batch: {error}; raise it, or lower train.max_length") from error

    def get_train_dataloader(self) -> Any:
        """As the Trainer's; batches stay on the host until their turn: it fetches those of a whole optimizer step at once."""
        loader = self._loader_of_tokens() if self._batches is not None else super().get_train_dataloader()
        if isinstance(loader, DataLoaderShard):
            loader.device = None
        return loader

    def _loader_of_tokens(self) -> Any:
        """Batches of `train.tokens_per_batch`, each process its own."""
        args, data = self.args, self.train_dataset
        loader: Any = DataLoader(
            data,  # type: ignore[arg-type]
            batch_sampler=self._batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        even = self.accelerator.even_batches
        self.accelerator.even_batches = False  # they are: as many for every process
        try:
            return self.accelerator.prepare(loader)
        finally:
            self.accelerator.even_batches = even

    def _prepare_input(self, data: Any) -> Any:
        """As the Trainer's; what is pinned goes to the GPU without a wait for what runs there."""
        if isinstance(data, Tensor) and not self.is_deepspeed_enabled:  # that would change dtypes, too
            return data.to(self.args.device, non_blocking=data.is_pinned())
        return super()._prepare_input(data)

    def _prepare_inputs(self, inputs: Any) -> Any:
        """As the Trainer's; the lengths stay on the host, which reads them (model/packing.py)."""
        return {**super()._prepare_inputs(inputs), "lengths": inputs["lengths"]}

    def _get_num_items_in_batch(self, batch_samples: list[PairBatch], device: torch.device) -> Tensor:
        """Pairs of one optimizer step, over all its micro-batches and all processes."""
        pairs = sum(len(batch["pair_ids"]) for batch in batch_samples)
        count = torch.full((), pairs, device=device)  # to copy a number would be to wait
        return self.accelerator.gather(count).sum() if self.args.world_size > 1 else count

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The micro-batch's share of the step's mean over pairs (its own mean where `num_items_in_batch` is None)."""
        for said in inputs["instead"]:
            if said not in self.unreadable:
                self.unreadable.add(said)
                tqdm.write(f"warning: {said}", file=sys.stderr)
        outcome = self.pair_objective(model, inputs)
        pairs = inputs["pair_ids"]
        if bool(outcome.nonfinite.any() | ~torch.isfinite(outcome.loss)):  # the one look at the device in a micro-batch
            raise DivergenceError(self._why_not_finite(outcome, pairs))
        self._means["train" if model.training else "eval"].add(outcome, len(pairs))
        loss = outcome.loss
        if num_items_in_batch is not None:  # gradients are averaged over processes, hence their number
            loss = loss * (len(pairs) * self.accelerator.num_processes / num_items_in_batch)
        return (loss, outcome) if return_outputs else loss

    def _why_not_finite(self, outcome: Outcome, pairs: list[str]) -> str:
        bad = [name for name, broken in zip(pairs, outcome.nonfinite.tolist()) if broken] or pairs
        kind = "mixed precision fp16 overflows easily: use bf16" if self.args.fp16 else "lower train.learning_rate"
        return (
            f"step {self.state.global_step}: log-probabilities or loss are not finite for pairs {', '.join(bad)}; {kind}, "
            f"or look at these pairs. {self._kept()}"
        )

    def _kept(self) -> str:
        last = last_checkpoint(Path(str(self.args.output_dir)))
        return f"The last checkpoint, {last}, is intact" if last else "There is no checkpoint yet"

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """As the Trainer's; a norm that is not finite ends the run before weights, and a checkpoint, are made of it."""
        norm = super()._get_grad_norm(model, grad_norm)
        # under fp16 such steps are left out, until the scale of the loss fits
        if not self.args.fp16 and norm is not None and not math.isfinite(norm):
            raise DivergenceError(
                f"step {self.state.global_step}: the loss is finite, but its gradient is not; lower train.learning_rate, or use "
                f"float32 (model.dtype = float32, train.bf16 = false) to see whether it is the precision. {self._kept()}"
            )
        return norm

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """As the Trainer's. Raises MemoryLimitError where a step does not fit (but for `auto_find_batch_size`)."""
        try:
            return super().training_step(model, inputs, *args, **kwargs)
        except torch.OutOfMemoryError as error:
            if self.args.auto_find_batch_size:
                raise
            raise MemoryLimitError(
                f"step {self.state.global_step}: {len(inputs['pair_ids'])} pairs, {inputs['tokens']} tokens, do not fit in the "
                f"memory of {self.args.device} ({str(error).splitlines()[0]}); lower train.per_device_train_batch_size and raise "
                "train.gradient_accumulation_steps as much, set train.activation_checkpointing = true, or lower train.max_length "
                f"or frames.maximum. `synpo plan` says what fits. {self._kept()}"
            ) from error

    def _track_num_input_tokens(self, inputs: PairBatch) -> None:
        """As the Trainer's, which would wait for the device after every micro-batch."""
        if self.args.world_size > 1 or self.args.include_num_input_tokens_seen != "non_padding":
            return super()._track_num_input_tokens(inputs)
        self.state.num_input_tokens_seen += inputs["tokens"]

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """As the Trainer's, which finds adapters alone: weights of some models are saved under other names than theirs,
        and it would go on with those it has. Reading the checkpoint as a model turns the names back."""
        own: Any = self.lm.model
        if not isinstance(own, PreTrainedModel) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        own.load_state_dict(type(own).from_pretrained(resume_from_checkpoint, dtype=own.dtype).state_dict())

    def _load_best_model(self) -> None:
        """As the Trainer's, with the same difference."""
        if isinstance(self.lm.model, PreTrainedModel) and self.state.best_model_checkpoint is not None:
            self._load_from_checkpoint(self.state.best_model_checkpoint, self.model)
        else:
            super()._load_best_model()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self.saver.writing(), writing(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            write_card(Path(str(output_dir or self.args.output_dir)), self)  # in place of PEFT's

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, before what is trained goes to the hub."""
        if self.args.should_save:
            write_card(Path(str(self.args.output_dir)), self)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, which takes a step too many where a run goes on that has made its last one within an epoch."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        """As the Trainer's; at the start of a run that goes on it is one that was left out, and counts as it would have."""
        left_out = skip_scheduler and self.state.global_step > 0
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler and not left_out)
        if left_out:
            self._determine_best_metric(metrics, trial)
        return metrics

    def _sampled(self, count: int) -> list[EncodedPair]:
        """The held-out pairs whose prompts are answered at every evaluation."""
        held: Any = self.eval_dataset
        return [] if held is None or isinstance(held, dict) else [held[i] for i in range(min(count, len(held)))]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; the metrics hold the means over all pairs, and how greedy samples repeat themselves.

        It leaves random numbers as they were: a run that goes on from a checkpoint before it draws the same ones.
        """
        with torch.random.fork_rng([self.args.device] if self.args.device.type == "cuda" else []):
            return self._evaluation(*args, **kwargs)

    def _evaluation(self, *args: Any, **kwargs: Any) -> Any:
        output = super().evaluation_loop(*args, **kwargs)
        means, metrics = self._means["eval"].drain(self.accelerator), output.metrics or {}
        if (prefix := next((name.removesuffix("loss") for name in metrics if name.endswith("_loss")), None)) is None:
            return output
        metrics.update({prefix + name: value for name, value in means.items()})
        settings: Any = self.args
        if (
            (best := settings.metric_for_best_model)
            and prefix == "eval_"
            and f"eval_{best.removeprefix('eval_')}" not in metrics
        ):
            known = [name.removeprefix("eval_") for name in metrics]
            raise ConfigError(f"train.metric_for_best_model: evaluation gives no {best!r}; {suggest(best, known)}")
        if prefix.startswith("eval") and settings.sample_tokens > 0 and (pairs := self._sampled(settings.samples)):
            with self.accelerator.autocast():
                metrics[prefix + "synpo/repetition"] = repetition(self.lm, pairs, settings.sample_tokens)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means over the pairs seen since the last log. Called by the Trainer."""
        if "loss" in logs:
            means = self._means["train"].drain(self.accelerator)
            logs.update({name: value for name, value in means.items() if name != "loss"})
            logs["num_tokens"] = self.state.num_input_tokens_seen
        super().log(logs, start_time)


class _Means:
    """Sums of per-pair statistics on their device, turned into means once a log."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sums: Tensor | None = None
        self.pairs = 0

    def add(self, outcome: Outcome, pairs: int) -> None:
        values = {"loss": outcome.loss.detach() * pairs, **{k: v.sum() for k, v in outcome.statistics.items()}}
        sums = torch.stack([v.double() for v in values.values()])
        self.names, self.pairs = list(values), self.pairs + pairs
        self.sums = sums if self.sums is None else self.sums + sums

    def drain(self, accelerator: Any) -> dict[str, float]:
        if self.sums is None:
            return {}
        total = accelerator.reduce(torch.cat([self.sums, self.sums.new_tensor([self.pairs])]), "sum").tolist()
        self.sums, self.pairs = None, 0
        return {name: value / total[-1] for name, value in zip(self.names, total)}


class JsonLog(TrainerCallback):
    """Every log of the Trainer as one line of JSON, on the disk at once; resuming drops lines past the checkpoint.

    The last step is logged however seldom the others are: what a run came to is known from it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not self.path.exists():
            return
        kept = [row for _, row in read_jsonl(self.path) if row["step"] <= state.global_step and state.global_step > 0]
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_log |= state.global_step >= state.max_steps
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")
            file.flush()
            os.fsync(file.fileno())
