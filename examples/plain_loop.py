"""SynPO in a plain PyTorch loop: a small Llama from its configuration, texts as bytes, seconds on a CPU.

    python examples/plain_loop.py

Each step checks the fused loss against the naive one, which holds all logits.
"""

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

from synpo_kernels import FusedLinearSynPOLoss, hidden_states_and_head
from synpo_kernels.reference import naive_synpo

END = 256  # after the 256 bytes
PAIRS = [
    ("What moves? ", "A small red circle moves to the right.", "Nothing moves."),
    ("And then? ", "It turns blue and leaves.", "It rains, it rains, it rains."),
    ("How many shapes? ", "Two.", "There may be some shapes, or none."),
]


def batch(pairs: list[tuple[str, str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (2B, L), chosen answers first, and labels (2B, L): labels[i, t] is the token position t predicts, or -100."""
    rows, labels = [], []
    for answer in (1, 2):
        for pair in pairs:
            prompt, completion = list(pair[0].encode()), [*pair[answer].encode(), END]
            rows.append(torch.tensor(prompt + completion))
            labels.append(torch.tensor([-100] * (len(prompt) - 1) + completion + [-100]))
    return pad_sequence(rows, True, END), pad_sequence(labels, True, -100)


def main() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=257, **shape))
    model.lm_head.requires_grad_(False)  # as under LoRA: backward is then elementwise
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    loss_fn = FusedLinearSynPOLoss(alpha=30.0, beta=0.2)

    ids, labels = batch(PAIRS)
    for step in range(20):
        hidden, head = hidden_states_and_head(model, input_ids=ids)  # causal: no mask for padding on the right
        out = loss_fn(hidden, head, labels)
        naive = naive_synpo(hidden.detach(), head.weight, labels)
        torch.testing.assert_close(out.loss.detach(), naive.loss, rtol=1e-5, atol=1e-6)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1:2}: loss {out.loss:.5f}, naive {naive.loss:.5f}, margin {out.margin.mean():+.4f}")
    assert out.margin.mean() > 0, "the chosen answers should be the likelier ones by now"


if __name__ == "__main__":
    main()
