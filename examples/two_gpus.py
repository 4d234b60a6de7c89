"""SynPO on two GPUs, in a plain PyTorch loop: DDP, or FSDP2 with `--fsdp`.

    torchrun --nproc-per-node=2 examples/two_gpus.py [--fsdp]
    torchrun --nproc-per-node=2 examples/two_gpus.py --cpu       # two processes on a CPU; without torchrun it is one

Each process has pairs of its own, and gradients are averaged. The head is trained here, and spread under FSDP2: the loss gathers
it. However many processes there are, the losses printed are the same.
"""

import argparse
import gc
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

from synpo_kernels import FusedLinearSynPOLoss, hidden_states_and_head

END = 256  # after the 256 bytes
PAIRS = [(f"What moves in video {i}? ", f"{i} red circles move.", "A video." * (i % 3 + 1)) for i in range(8)]


def batch(pairs: list[tuple[str, str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (2B, L), chosen answers first, and labels (2B, L): labels[i, t] is the token position t predicts, or -100."""
    rows, labels = [], []
    for answer in (1, 2):
        for pair in pairs:
            prompt, completion = list(pair[0].encode()), [*pair[answer].encode(), END]
            rows.append(torch.tensor(prompt + completion))
            labels.append(torch.tensor([-100] * (len(prompt) - 1) + completion + [-100]))
    return pad_sequence(rows, True, END), pad_sequence(labels, True, -100)


def train(rank: int, world: int, device: torch.device, fsdp: bool) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=257, **shape)).to(device)
    if world > 1 and fsdp:
        mesh = init_device_mesh(device.type, (world,))
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=mesh)
    elif world > 1:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss_fn = FusedLinearSynPOLoss(alpha=30.0, beta=0.2)

    ids, labels = (x.to(device) for x in batch(PAIRS[rank::world]))
    for step in range(10):
        hidden, head = hidden_states_and_head(model, input_ids=ids)  # causal: no mask for padding on the right
        loss = loss_fn(hidden, head, labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / world
        if world > 1:
            dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step + 1:2}: loss {mean:.6f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fsdp", action="store_true", help="spread the weights over the processes")
    parser.add_argument("--cpu", action="store_true", help="processes on a CPU instead of GPUs")
    arguments = parser.parse_args()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu" if arguments.cpu else f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("gloo" if arguments.cpu else "nccl")
    train(rank, world, device, arguments.fsdp)
    gc.collect()  # a model that outlives the group, as FSDP2's would, lets a process over gloo hang or abort at its end
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
