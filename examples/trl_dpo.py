"""TRL's DPOTrainer with its loss replaced: its data handling, collator and loop stay, objective and head are ours.

    pip install trl
    python examples/trl_dpo.py

`SynPO` needs no reference model, so none is loaded, with LoRA or without. `FusedDPO` is TRL's own objective through the fused
kernels; at every step it must give the loss that TRL gives.
"""

import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from synpo.model.tiny import byte_tokenizer, tiny_text_model
from synpo_kernels import (
    FusedLinearSynPOLoss,
    SequenceStats,
    hidden_states_and_head,
    linear_logprobs,
    losses,
    sequence_stats,
)

TOKENIZER = byte_tokenizer()
PAIRS = Dataset.from_list(
    [
        {
            "prompt": f"What moves in video {i}?",
            "chosen": f"{i} red circles move.",
            "rejected": "A video." * (i % 3 + 1),
        }
        for i in range(12)
    ]
)


def labels_of(inputs: Any) -> torch.Tensor:
    """(2B, L - 1): the token that each position but the last predicts, where it belongs to an answer; TRL's chosen come first."""
    return inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)[:, 1:]


class SynPO(DPOTrainer):
    """SynPO in place of DPO."""

    loss = FusedLinearSynPOLoss(alpha=30.0, beta=0.2)

    def __init__(self, args: DPOConfig, **options: Any) -> None:
        args.precompute_ref_log_probs = True  # so TRL keeps no reference model, and below it computes nothing with one
        super().__init__(args=args, **options)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        return dataset

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        reads = {name: value for name, value in inputs.items() if name != "completion_mask"}
        hidden, head = hidden_states_and_head(model, **reads)
        out = self.loss(hidden[:, :-1], head, labels_of(inputs))
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["rewards/margins"].append(out.margin.mean().item())
        return (out.loss, out) if return_outputs else out.loss


class FusedDPO(DPOTrainer):
    """DPO as TRL has it for an adapter that starts as nothing: the reference is the model with its adapter off."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        stats = self.stats(model, inputs)
        with torch.no_grad(), self.accelerator.unwrap_model(model).disable_adapter():
            reference = self.stats(model, inputs)
        return losses.dpo(stats, reference, beta=self.beta)

    def stats(self, model: Any, inputs: Any) -> SequenceStats:
        """Statistics of the 2B sequences of a batch, without logits."""
        hidden, head = hidden_states_and_head(model, **{k: inputs[k] for k in ("input_ids", "attention_mask")})
        labels = labels_of(inputs)
        return sequence_stats(linear_logprobs(hidden[:, :-1], head, labels), labels)


def run(kind: type[DPOTrainer], folder: str, lora: bool = True) -> list[float]:
    """Losses of every optimizer step of a short training."""
    args = DPOConfig(
        folder,
        beta=0.1,
        learning_rate=1e-2 if lora else 1e-3,
        num_train_epochs=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    adapter = LoraConfig(r=8, target_modules=r".*\.(q|v|up|down)_proj", task_type="CAUSAL_LM")
    trainer = kind(
        model=tiny_text_model(TOKENIZER),
        args=args,
        train_dataset=PAIRS,
        processing_class=TOKENIZER,
        peft_config=adapter if lora else None,
    )
    trainer.train()
    assert trainer.ref_model is None
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        theirs, fused = run(DPOTrainer, folder), run(FusedDPO, folder)
        adapted, whole = run(SynPO, folder), run(SynPO, folder, lora=False)
    for step, (expected, got, *synpo) in enumerate(zip(theirs, fused, adapted, whole), 1):
        print(
            f"step {step}: DPO by TRL {expected:.6f}, fused {got:.6f}; SynPO {synpo[0]:.6f}, without LoRA {synpo[1]:.6f}"
        )
        assert abs(expected - got) < 1e-4 * abs(expected), "the two DPO losses should agree"
    assert len(fused) == 6 and all(run[-1] < run[0] for run in (fused, adapted, whole))


if __name__ == "__main__":
    main()
