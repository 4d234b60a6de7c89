"""What certified skipping leaves out, gains and costs under a head that was really trained.

    python -m bench.trained_head [--data FOLDER] [--tokenizer FILE] [--minutes 4] [--rows 1024] [--out bench/results/today]

Trains a small language model on the captions of a folder (`small_lm`; once, its weights stay in --work and are used again for
the same captions), takes its hidden states on captions it has not seen, and measures at three tolerances, in turns with the
dense pass of the same backend, with that of the default one (on a CPU it is another, the compiled one) and with the two matrix
products alone (`floor`), under which skipping is to come:

    kept        share of the gradient's product that is multiplied; beside it what whole tiles would keep
    time        forward pass with gradient, beside the dense one and the one without gradient (its floor)
    error       ‖U - U₆₄‖ / ‖U₆₄‖ of U = ∂logp/∂hidden against float64, the certified bound, and what rounding to bf16 does

A model of this size is far less sure of its next token than a large one, and the tail of its softmax is what decides. So each
figure is also taken with its logits scaled up until the mean entropy is 2.1 and 1.2 nats, as we suppose of larger models on such
text: a stand-in, marked as such, not a measurement of one. Writes OUT.json. Without --data it looks for ../shared/data beside
the checkout.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bench import measure  # before torch

import torch  # isort: skip
from torch import Tensor  # isort: skip

from bench import floor, small_lm
from synpo_kernels import certified, chunked
from synpo_kernels.dispatch import choose
from synpo_kernels.head import Head

TOLERANCES = (2.0**-12, 2.0**-10, 2.0**-8)
ENTROPIES = (None, 2.1, 1.2)  # nats: as trained; as supposed of larger models, by scaling the logits
TILES = ((128, 128), (128, 256))
FILTER = 2.0**-12  # cut-cross-entropy's rule: a tile is left out where no |p - onehot| reaches this
HELD_OUT = 10  # one record in so many is not trained on
LEAST_WORDS = 4  # a string of fewer is no caption
HEADS = small_lm.Size.heads
DTYPES = ("float32", "bfloat16", "float16")


def records(folder: Path) -> Iterator[list[str]]:
    """The texts of every line of a .jsonl, element of a list or value of an object, in a folder's files in order."""
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".jsonl")):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            values = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            whole = json.loads(text)
            values = list(whole.values()) if isinstance(whole, dict) else whole
        for value in values:
            if isinstance(value, dict) and len(value) == 1:  # {id: content} as a line of its own
                value = next(iter(value.values()))
            yield [text for text in _strings(value) if len(text.split()) >= LEAST_WORDS]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def corpus(folder: Path, tokenizer_file: Path) -> tuple[Tensor, Tensor, int]:
    """(training tokens, held-out tokens, vocabulary size); a text that occurred before is left out."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    seen: set[str] = set()
    split: tuple[list[str], list[str]] = ([], [])
    for number, texts in enumerate(records(folder)):
        fresh = [text for text in dict.fromkeys(texts) if text not in seen]
        seen.update(fresh)
        split[number % HELD_OUT == 0].extend(fresh)
    order = torch.randperm(len(split[0]), generator=torch.Generator().manual_seed(0)).tolist()
    train, held_out = (
        torch.tensor([token for entry in tokenizer.encode_batch(texts) for token in [*entry.ids, 0]])
        for texts in ([split[0][i] for i in order], split[1])
    )
    if len(train) < 10 * small_lm.CONTEXT or len(held_out) <= small_lm.CONTEXT:
        raise SystemExit(f"{folder} holds too few captions: {len(train)} tokens to train on, {len(held_out)} held out")
    return train, held_out, tokenizer.get_vocab_size()


@torch.no_grad()
def states(model: small_lm.SmallLM, tokens: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Hidden states (N, D) and labels (N,) of consecutive windows of `small_lm.CONTEXT`, N ≤ rows."""
    length = small_lm.CONTEXT
    windows = tokens[: (len(tokens) - 1) // length * length + 1].unfold(0, length + 1, length)[: rows // length]
    return model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()


def entropies(x: Tensor, head: Tensor, scale: float) -> Tensor:
    """(N,) nats."""
    logs = (x @ head.T).mul_(scale).log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)


def scale_for(x: Tensor, head: Tensor, entropy: float) -> float:
    """The factor on the logits that gives this mean entropy."""
    low, high = 0.25, 16.0
    for _ in range(12):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if entropies(x, head, middle).mean() > entropy else (low, middle)
    return (low * high) ** 0.5


def tile_share(residual: Tensor, tile: tuple[int, int], *, tolerance: float | None) -> float:
    """Share of tiles of |softmax - onehot| (N, V) kept where a row may lose `tolerance` in all; None: by `FILTER`."""
    kept = total = 0
    for block in residual.split(tile[0]):
        wide = torch.nn.functional.pad(block, (0, -block.shape[1] % tile[1])).unflatten(1, (-1, tile[1]))
        total += wide.shape[1]
        if tolerance is None:
            kept += int((wide.amax((0, 2)) >= FILTER).sum())
            continue
        mass = wide.sum(2)
        lost = mass[:, mass.amax(0).argsort()].cumsum(1).amax(0)
        kept += int((lost > tolerance).sum())
    return kept / total


def problem(x: Tensor, head: Tensor, labels: Tensor, scale: float, seconds: float, backend: str) -> dict[str, Any]:
    """All figures at one scale of the logits."""
    device = x.device
    logs = (x.float() @ head.float().T).mul_(scale).log_softmax(-1)
    p = logs.exp()
    tail = p.topk(max(0, p.shape[1] - 1000), dim=1, largest=False).values.sum(1)
    residual = p.scatter_add(1, labels[:, None], torch.full_like(labels[:, None], -1, dtype=p.dtype)).abs_()
    found: dict[str, Any] = {
        "logit_scale": scale,
        "entropy": -(p * logs).sum(1).mean().item(),
        "nll": -logs.gather(1, labels[:, None]).mean().item(),
        "tail_beyond_1000_median": tail.median().item(),
        "tail_beyond_1000_p90": tail.quantile(0.9).item(),
        **{f"tiles_{n}x{w}_by_element": tile_share(residual, (n, w), tolerance=None) for n, w in TILES},
        "tolerances": [],
    }
    del logs, p
    truth = chunked.forward(
        x.double(), Head(head.double(), logit_scale=scale), labels, want_direction=True
    ).direction.double()
    length = truth.norm()

    def run(tolerance: float | None, want_direction: bool = True, by: str = backend) -> tuple[Any, ...]:
        if tolerance is None:
            whole = choose(by, x).forward(x, Head(head, logit_scale=scale), labels, want_direction=want_direction)
            return whole.logps, whole.direction
        return certified.certified(x, head, None, labels, None, scale, None, backend, tolerance, True)

    runs = {"dense": partial(run, None), "no gradient": partial(run, None, want_direction=False)}
    runs["default"] = partial(run, None, by="auto")
    runs |= floor.frozen(x, head)
    runs |= {f"{tolerance}": partial(run, tolerance) for tolerance in TOLERANCES}
    for warm_up in runs.values():
        warm_up()
    times = measure.interleave(runs, device=device, seconds=seconds, title=f"scale {scale:.2f}")
    found |= {"dense_ms": times["dense"].p50, "no_gradient_ms": times["no gradient"].p50}
    found["default_ms"] = times["default"].p50
    found["floor_ms"] = min(times[name].p50 for name in floor.frozen(x, head))
    found["dense_error"] = ((run(None)[1].double() - truth).norm() / length).item()
    found["rounding_bf16"] = ((truth.bfloat16().double() - truth).norm() / length).item()
    for tolerance in TOLERANCES:
        _, direction, bound, kept = run(tolerance)
        error = (direction.double() - truth).norm(dim=1)
        found["tolerances"].append(
            {
                "tolerance": tolerance,
                "kept": kept.item(),
                **{f"tiles_{n}x{w}": tile_share(residual, (n, w), tolerance=tolerance) for n, w in TILES},
                "ms": times[f"{tolerance}"].p50,
                "gain": times["dense"].p50 / times[f"{tolerance}"].p50,
                "over_floor": times[f"{tolerance}"].p50 / found["floor_ms"],
                "error": (error.norm() / length).item(),
                "bound": (bound.double().norm() / length).item(),
                "worst_row_over_bound": (error / (bound + 1e-5 * truth.norm(dim=1))).max().item(),
            }
        )
    return found


def show(found: dict[str, Any], entropy: float | None) -> None:
    name = "as trained" if entropy is None else "logits scaled up: a stand-in for a larger model"
    print(
        f"\n{name}: scale {found['logit_scale']:.2f}, entropy {found['entropy']:.2f} nats, mass beyond 1000 tokens "
        f"{found['tail_beyond_1000_median']:.1e} (median) {found['tail_beyond_1000_p90']:.1e} (90 %)\n"
        f"dense {found['dense_ms']:.1f} ms, without gradient {found['no_gradient_ms']:.1f} ms, dense on the default "
        f"backend {found['default_ms']:.1f} ms, the products alone {found['floor_ms']:.1f} ms\nerror of the dense gradient "
        f"{found['dense_error']:.1e}, of rounding it to bf16 {found['rounding_bf16']:.1e}\n"
        f"tiles kept by the largest element: {found['tiles_128x128_by_element']:.0%} of 128x128, "
        f"{found['tiles_128x256_by_element']:.0%} of 128x256\n"
        f"{'tolerance':>9} {'kept':>7} {'128x128':>8} {'128x256':>8} {'ms':>8} {'gain':>6} {'/floor':>6} {'error':>9} "
        f"{'bound':>9}"
    )
    for row in found["tolerances"]:
        print(
            f"{row['tolerance']:9.1e} {row['kept']:7.1%} {row['tiles_128x128']:8.1%} {row['tiles_128x256']:8.1%} "
            f"{row['ms']:8.1f} {row['gain']:6.2f} {row['over_floor']:6.2f} {row['error']:9.1e} {row['bound']:9.1e}"
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.trained_head", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shared = measure.ROOT.parent / "shared" / "data" / "captions"
    parser.add_argument("--data", type=Path, help="folder of .json and .jsonl captions (../shared/data/captions)")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json (the first one in DATA/../tokenizers)")
    parser.add_argument(
        "--work", type=Path, default=measure.ROOT / ".benchmarks" / "trained_head", help="for the weights"
    )
    parser.add_argument(
        "--minutes", type=float, default=4.0, help="of training in all; a model that had them is used as it is (4)"
    )
    parser.add_argument("--hidden", type=int, default=384, help=f"size of its states, {HEADS} heads (384)")
    parser.add_argument("--rows", type=int, default=1024, help="of its states, whole windows of 64 (1024)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing for each scale of the logits (20)")
    parser.add_argument("--threads", type=int, help="torch's threads (torch's own choice)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="format of hidden states and head (bfloat16 on CUDA, float32 on a CPU)"
    )
    parser.add_argument("--backend", help="triton on CUDA, chunked on a CPU: of both passes")
    parser.add_argument("--out", type=Path, help="path without suffix (bench/results/<date>_<chip>_trained_head)")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.hidden < 1 or options.hidden % HEADS or options.rows < small_lm.CONTEXT:
        parser.error(
            f"expected --hidden in multiples of {HEADS} and --rows of at least {small_lm.CONTEXT}, "
            f"got {options.hidden} and {options.rows}"
        )
    data = options.data or shared
    found = sorted((data.parent / "tokenizers").glob("*.json")) if options.tokenizer is None else []
    tokenizer = options.tokenizer or (found[0] if found else None)
    if not data.is_dir() or tokenizer is None or not tokenizer.is_file():
        missing = (
            f"there are no captions in {data} or no tokenizer beside it; give a folder of .json or .jsonl "
            "files with --data and a tokenizer.json with --tokenizer"
        )
        if options.data or options.tokenizer:
            parser.error(missing)
        print(f"skipped: {missing}")
        return 0
    device = torch.device(options.device)
    train, held_out, vocab = corpus(data, tokenizer)
    options.work.mkdir(parents=True, exist_ok=True)
    of = hashlib.sha256(train.numpy().tobytes()).hexdigest()[
        :8
    ]  # other captions, another model: what is held out stays unseen
    path = options.work / f"lm_{vocab}x{options.hidden}_{of}.safetensors"
    size = small_lm.Size(vocab, options.hidden)
    model = small_lm.train(train, size, path, seconds=60 * options.minutes, device=device)
    taught = small_lm.load(path)[1]
    x, labels = states(model, held_out.to(device), options.rows)
    facts = measure.machine(device) | {
        "model": f"V {vocab}, D {options.hidden}, {float(taught['seconds']) / 60:.2g} min, {taught['steps']} steps of "
        f"{small_lm.BATCH * small_lm.CONTEXT} tokens from {len(train)}",
        "rows": str(len(x)),
    }
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    head = model.head.detach()
    scales = [(entropy, 1.0 if entropy is None else scale_for(x, head, entropy)) for entropy in ENTROPIES]
    x, head, labels = x.to(device, dtype), head.to(device, dtype), labels.to(device)
    backend = options.backend or ("triton" if device.type == "cuda" else "chunked")
    out = options.out or Path(__file__).parent / "results" / f"{facts['date']}_{measure.chip_slug(device)}_trained_head"
    out.parent.mkdir(parents=True, exist_ok=True)
    for key, value in facts.items():
        print(f"{key:20} {value}")
    rows = []
    for entropy, scale in scales:
        rows.append(problem(x, head, labels, scale, options.seconds, backend) | {"stand_in": entropy is not None})
        show(rows[-1], entropy)
        part = out.with_name(out.name + ".json.part")
        part.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
        os.replace(part, out.with_name(out.name + ".json"))
    print(f"\nwritten: {out}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
