"""TRL's DPOTrainer with its loss replaced: its data handling, collator and loop stay, the objective and the head are ours.

    pip install trl
    python examples/trl_dpo.py

Trains LoRA adapters on a small Llama: DPO as TRL computes it and through the fused kernels, which must agree at every step,
then SynPO, which needs no reference pass at all.
"""

import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from synpo.model.adapter import CaptionModel
from synpo.model.tiny import byte_tokenizer, tiny_text_model
from synpo_kernels import OBJECTIVES, SequenceStats, linear_logprobs, sequence_stats

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


class FusedTrainer(DPOTrainer):
    """`objective` is any name of `synpo_kernels.OBJECTIVES`; those with a reference take it with the adapter off."""

    objective = "synpo"

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        objective = OBJECTIVES[self.objective]
        stats = self.stats(model, inputs)
        references = []
        if objective.needs_reference:
            with torch.no_grad(), self.accelerator.unwrap_model(model).disable_adapter():
                references = [self.stats(model, inputs)]
        parameters = {"beta": self.beta} if self.objective == "dpo" else {}
        loss = objective(stats, *references, **parameters)
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["logps/chosen"].append(stats.chosen.logps.mean().item())
        metrics["logps/rejected"].append(stats.rejected.logps.mean().item())
        return loss

    def stats(self, model: Any, inputs: Any) -> SequenceStats:
        """Statistics of the 2B sequences of TRL's batch (chosen first), without logits."""
        lm = CaptionModel(model, self.processing_class, None)
        hidden = lm.hidden_states({name: inputs[name] for name in ("input_ids", "attention_mask")}, model)
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)[:, 1:]
        logps = linear_logprobs(hidden[:, :-1], lm.head().weight, labels.contiguous())
        return sequence_stats(logps, labels)


class FusedDPO(FusedTrainer):
    objective = "dpo"


def run(kind: type[DPOTrainer], folder: str) -> list[float]:
    """Losses of every optimizer step of a short training."""
    args = DPOConfig(
        folder,
        beta=0.1,
        learning_rate=1e-2,
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
    trainer = kind(
        model=tiny_text_model(TOKENIZER),
        args=args,
        train_dataset=PAIRS,
        processing_class=TOKENIZER,
        peft_config=LoraConfig(r=8, target_modules=r".*\.(q|v|up|down)_proj", task_type="CAUSAL_LM"),
    )
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        theirs, fused, synpo = (run(kind, folder) for kind in (DPOTrainer, FusedDPO, FusedTrainer))
    assert len(fused) == 6 and fused[-1] < fused[0] and synpo[-1] < synpo[0]
    for step, (expected, got, other) in enumerate(zip(theirs, fused, synpo), 1):
        print(f"step {step}: DPO by TRL {expected:.6f}, fused {got:.6f}; SynPO {other:.6f}")
        assert abs(expected - got) < 1e-4 * abs(expected), "the two DPO losses should agree"


if __name__ == "__main__":
    main()
