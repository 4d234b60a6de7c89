"""SynPO in a Hugging Face `Trainer`: three lines change, and the logits are gone.

    python examples/hf_trainer.py

Trains the same small Llama twice, with the naive loss and with the fused one, and checks that every step agrees.
"""

import tempfile
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from synpo_kernels import FusedLinearSynPOLoss, hidden_states_and_head

END = 256  # after the 256 bytes
PAIRS = [
    {
        "prompt": f"What moves in video {i}? ",
        "chosen": f"{i} red circles move.",
        "rejected": "It is a video." * (i % 3 + 1),
    }
    for i in range(12)
]


def naive_loss(logits: Tensor, labels: Tensor, alpha: float = 30.0, beta: float = 0.2) -> Tensor:
    """SynPO from logits (2B, L, V) as one would write it first; chosen answers first, labels aligned."""
    kept = labels != -100
    logps = logits.float().log_softmax(-1).gather(-1, labels.where(kept, 0)[..., None])[..., 0]
    tokens = kept.sum(-1)
    chosen, rejected = ((logps * kept).sum(-1) / tokens).exp().chunk(2)
    language = ((logps.exp() * kept).sum(-1) / tokens).chunk(2)[0]
    return -(torch.sigmoid(alpha * (chosen - rejected)) + beta * language).mean()


class NaiveTrainer(Trainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        return naive_loss(logits, labels)


class FusedTrainer(Trainer):
    loss = FusedLinearSynPOLoss(alpha=30.0, beta=0.2)  # 1

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        hidden, head = hidden_states_and_head(model, **inputs)  # 2
        return self.loss(hidden, head, labels).loss  # 3


def collate(pairs: list[dict[str, str]]) -> dict[str, Tensor]:
    """input_ids, attention_mask, labels (2B, L): chosen answers first; labels[i, t] is the token position t predicts."""
    rows, labels = [], []
    for side in ("chosen", "rejected"):
        for pair in pairs:
            prompt, answer = list(pair["prompt"].encode()), [*pair[side].encode(), END]
            rows.append(torch.tensor(prompt + answer))
            labels.append(torch.tensor([-100] * (len(prompt) - 1) + answer + [-100]))
    mask = [torch.ones_like(row) for row in rows]
    return {
        "input_ids": pad_sequence(rows, True, END),
        "attention_mask": pad_sequence(mask, True, 0),
        "labels": pad_sequence(labels, True, -100),
    }


def run(kind: type[Trainer], folder: str) -> list[float]:
    """Losses of every optimizer step of a short training."""
    set_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    args = TrainingArguments(
        folder,
        learning_rate=3e-3,
        num_train_epochs=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    model = LlamaForCausalLM(LlamaConfig(vocab_size=257, **shape))
    trainer = kind(model=model, args=args, train_dataset=PAIRS, data_collator=collate)  # type: ignore[arg-type]
    trainer.model_accepts_loss_kwargs = False  # compute_loss gives the mean of its micro-batch
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        naive, fused = run(NaiveTrainer, folder), run(FusedTrainer, folder)
    assert len(fused) == 9 and fused[-1] < fused[0]
    for step, (expected, got) in enumerate(zip(naive, fused), 1):
        print(f"step {step}: naive {expected:.6f}, fused {got:.6f}")
        assert abs(expected - got) < 1e-5 * abs(expected), "the two losses should agree"


if __name__ == "__main__":
    main()
