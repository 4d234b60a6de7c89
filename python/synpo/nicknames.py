"""What people call settings that have another name here."""

from __future__ import annotations

NICKNAMES = {
    "lr": "train.learning_rate",
    "epochs": "train.num_train_epochs",
    "num_epochs": "train.num_train_epochs",
    "steps": "train.max_steps",
    "loss": "train.loss_type",
    "objective": "train.loss_type",
    "micro_batch": "train.per_device_train_batch_size",
    "train_batch_size": "train.per_device_train_batch_size",
    "accumulation": "train.gradient_accumulation_steps",
    "grad_accum": "train.gradient_accumulation_steps",
    "warmup": "train.warmup_steps",
    "scheduler": "train.lr_scheduler_type",
    "optimizer": "train.optim",
    "max_seq_length": "train.max_length",
    "fp32": "model.dtype",
    "precision": "model.dtype",
    "wandb": "train.report_to",
    "tracker": "train.report_to",
    "rank": "lora.r",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "num_candidates": "pairs.candidates",
    "judge": "judge.kind",
    "judge_model": "judge.model",
    "api_base": "judge.base_url",
    "api_key": "judge.key_env",
    "frames": "frames.maximum",
    "max_frames": "frames.maximum",
    "qlora": "model.quantization",
}
"""A name of other tools, dashes as underscores → the setting."""
