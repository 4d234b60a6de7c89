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

import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedModel, ProgressCallback, Trainer
from transformers.trainer_callback import PrinterCallback

from synpo.config import ConfigError, suggest
from synpo.data.batches import TokenBatches
from synpo.data.collate import PairBatch
from synpo.data.tokenize import EncodedPair
from synpo.records import read_jsonl
from synpo.train.arguments import SynPOConfig
from synpo.train.bar import TrainingBar
from synpo.train.card import write_card
from synpo.train.checkpoint import last_checkpoint, owes_evaluation, writing
from synpo.train.choices import half, settle
from synpo.train.given import Data, model_of, name_of, workers
from synpo.train.guard import Curves, Guard, GuardError
from synpo.train.layers import prepare
from synpo.train.log import LOG_NAME, JsonLog, Means
from synpo.train.lora import check_trained
from synpo.train.objective import Outcome, PairObjective
from synpo.train.reference import precompute
from synpo.train.repetition import repetition
from synpo.train.saving import Saver
from synpo.train.sharing import collator_for
from synpo.video import FrameSampling
from synpo_kernels.backends.choice import choose


class DivergenceError(ValueError):
    """Loss or gradient is not finite. The message names the pairs and the settings to change."""


class MemoryLimitError(ValueError):
    """A step does not fit in the memory of the device. The message names the settings to change."""


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
        try:
            choose(args.loss_backend, torch.empty(0, dtype=half(args) or lm.head().weight.dtype, device=args.device))
        except ValueError as error:
            raise ConfigError(f"train.loss_backend: {error}") from error
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
        self._means = {"train": Means(), "eval": Means()}
        self.unreadable: set[str] = set()  # what was said of pairs that others stood in for
        self.bar = TrainingBar()
        self.remove_callback(PrinterCallback)
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(self.bar)
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

        Raises GuardError where `args.guard` stopped the run, ValueError where nothing would be trained.
        """
        check_trained(self.lm.model)
        settings: Any = self.args
        output = Path(str(settings.output_dir))
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_checkpoint(output) or "") or True
        if isinstance(resume_from_checkpoint, str):
            settings.eval_on_start = owes_evaluation(Path(resume_from_checkpoint), output / LOG_NAME, settings)
        kind = self.pair_objective.reference
        if kind == "start" or (kind == "base" and settings.precompute_reference):
            self.pair_objective.references = precompute(self, resuming=bool(resume_from_checkpoint))
        try:
            done = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.bar.close()
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
