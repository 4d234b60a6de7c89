"""The settings of a training run, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import importlib.util
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import trainer_log_levels

from synpo.config import DEFAULT_LOSS, LOSS_PARAMETERS, ConfigError, build, suggest
from synpo.setting import Range, above, at_least, check, one_of, setting
from synpo.train.choices import OPEN
from synpo.train.guard import MODES
from synpo.train.objective import parameters_of
from synpo.train.optimizers import check_optimizer
from synpo.train.reference import kind_of
from synpo_kernels.backends.choice import BACKENDS

LOSS_BACKENDS = ("auto", *BACKENDS)
TRACKERS = ("tensorboard", "wandb", "trackio")

OWN = {"output_dir", "seed", "data_seed", "use_cpu", "resume_from_checkpoint"}
"""Set by the run itself: where things go, the seed, the device."""

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
    "max_steps": Range(lambda steps: steps == -1 or steps > 0, "at least 1, or -1 (then num_train_epochs counts)"),
    "neftune_noise_alpha": at_least(0),
    "log_level": one_of(*trainer_log_levels),
    "log_level_replica": one_of(*trainer_log_levels),
}
"""Of settings of TrainingArguments, which does not look at them."""


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
    loss_backend: str = setting("auto", f"Kernels of the loss: {', '.join(LOSS_BACKENDS)}.", one_of(*LOSS_BACKENDS))
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
    save_strategy: str = setting("epoch", "When to write a checkpoint: epoch, steps, best, or no (none at all).")
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
        check_optimizer(str(getattr(self.optim, "value", self.optim)), self.optim_args)
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
        self._check_what_is_named()
        self.activation_checkpointing = self.gradient_checkpointing = bool(self.activation_checkpointing)

    @property
    def loss_parameters(self) -> dict[str, float | None]:
        return {name: getattr(self, name) for name in LOSS_PARAMETERS}

    def _check_what_is_named(self) -> None:
        """Raise ConfigError where the schedule, the compiler or the loader of pairs cannot be made of its settings."""
        try:
            kwargs: Any = self.lr_scheduler_kwargs
            nothing = torch.optim.SGD([torch.zeros(1)], lr=self.learning_rate)
            get_scheduler(self.lr_scheduler_type, nothing, 0, 1, kwargs)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"train.lr_scheduler_kwargs = {self.lr_scheduler_kwargs!r}: {error}") from error
        if self.torch_compile:
            try:
                backend: Any = self.torch_compile_backend
                torch.compile(lambda: None, backend=backend, mode=self.torch_compile_mode)
            except RuntimeError as error:
                raise ConfigError(f"train.torch_compile_backend or train.torch_compile_mode: {error}") from error
        if self.dataloader_multiprocessing_context is not None and not self.dataloader_num_workers:
            raise ConfigError("train.dataloader_multiprocessing_context: set train.dataloader_num_workers, too")

    def _check(self) -> None:
        """Raise ConfigError for a figure that is out of range, of TrainingArguments as of our own."""
        try:
            check(self)
        except ValueError as error:
            raise ConfigError(f"train.{error}") from error
        _in_range(vars(self))


def _in_range(values: Mapping[str, Any]) -> None:
    """Raise ConfigError for a setting of TrainingArguments that is out of range."""
    for name, within in RANGES.items():
        if (value := values.get(name)) is not None and not within.fits(value):
            raise ConfigError(f"train.{name}: expected {within.words}, got {value!r}")


def checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """The section `train` of a configuration with every value of its setting's type.

    Raises ConfigError for an unknown key, one that the run sets, a value of the wrong type or out of range, and a parameter that
    the objective does not have or refuses.
    """
    fields = {f.name: f for f in dataclasses.fields(SynPOConfig) if f.init and f.name not in OWN}
    for name in OWN & values.keys():
        raise ConfigError(f"train.{name} is set by the run itself (--output, --seed, --device, --resume)")
    hints = typing.get_type_hints(SynPOConfig)
    named = [(name, hints[name], dataclasses.field(default=None, metadata=f.metadata)) for name, f in fields.items()]
    found: Any = build(dataclasses.make_dataclass("Train", named), values, "train")
    try:
        check(found)
    except ValueError as error:
        raise ConfigError(f"train.{error}") from error
    right = {name: getattr(found, name) for name in values}
    _in_range(right)
    parameters_of(right.get("loss_type", DEFAULT_LOSS), {name: right.get(name) for name in LOSS_PARAMETERS})
    return right


def check_reporters(names: str | list[str] | None) -> None:
    """Raise ConfigError for a tracker in `report_to` that is unknown or not installed, before any work."""
    for name in [names] if isinstance(names, str) else names or []:
        if name not in ("none", "all", *INTEGRATION_TO_CALLBACK):
            raise ConfigError(f"train.report_to: unknown tracker {name!r}; {suggest(name, TRACKERS)}")
        if name in TRACKERS and importlib.util.find_spec(name) is None:
            raise ConfigError(f"train.report_to: {name} is not installed: pip install 'synpo[{name}]'")
