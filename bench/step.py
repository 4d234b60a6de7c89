"""One training step, forward, backward and optimizer: ours beside the usual code and TRL's DPOTrainer.

    python -m bench.step [--hidden 512 --layers 8 --vocab 32000 --prompt 2560 --answer 300 --pairs 1 --dtype float32]
                         [--providers synpo] [--device cuda] [--threads 2] [--time-budget 200] [--profile]
                         [--out bench/results/step]

Everyone has the same model with the same LoRA, the same pairs and AdamW; on a GPU the precision, the layers and the activation
checkpointing that their users get by default, and in rows that end in `, kept` no checkpointing.
A provider first has to give the loss and the gradients of the usual code (two forward passes, full logits) on a small problem,
and those of the first of its objective on the very problem that is timed; one that does not shows no speed. Providers take
turns. Memory is the peak of one step above what was held before it, of all tensors (on a CPU the resident set too, which tells
as much of malloc as of the step); beside it what `synpo plan` estimates for our step, which is to lie within 10 % on a GPU.

`% chip` is the share of the rate of one large product on this device, measured in the same run, at which the arithmetic of the
step is done: that which it cannot do without (steps.arithmetic: prompts once, nothing computed again), whoever makes the step;
`x equal` is over TRL's row on the same settings. --profile prints one more step of each by kind of kernel (kinds.py).
Prints a table, and writes OUT.json and OUT.csv.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.steps import Provider, Size, Step

DEFAULTS = {
    "cpu": {"hidden": 512, "layers": 8, "vocab": 32000, "pairs": 1, "dtype": "float32"},
    "cuda": {"hidden": 2048, "layers": 16, "vocab": 152064, "pairs": 4, "dtype": "bfloat16"},
}
TOLERANCE = {"float32": (1e-5, 1e-3), "bfloat16": (2e-2, 1e-1)}  # relative, of the loss and in norm of all gradients
# At full size bfloat16 moves the log-probability of an answer, and so a pair's loss, by some percent, whoever computes it.
FULL_TOLERANCE = {"float32": (1e-5, 1e-3), "bfloat16": (1e-1, 1e-1)}


@dataclass(frozen=True)
class Row:
    """One provider; times in milliseconds a step, memory in MiB, errors relative."""

    case: str
    provider: str
    objective: str
    note: str
    status: str  # ok, wrong, absent, failed (at full size)
    reason: str = ""
    loss_error: float | None = None  # on the small problem, with the next
    gradient_error: float | None = None
    full_loss_error: float | None = None  # with the next: at full size, against the first of its objective
    full_gradient_error: float | None = None
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    runs: int = 0
    pairs_per_second: float | None = None
    chip_share: float | None = None
    equal: str = ""  # TRL's row on the same settings
    kinds: dict[str, tuple[float, int]] | None = None  # kind of kernel: milliseconds and launches of one step
    peak_mib: float | None = None
    plan_mib: float | None = None  # the same as `synpo plan` estimates it
    resident_mib: float | None = None
    load: float | None = None


def gradient_of(step: Step) -> Any:
    """All gradients after a backward pass, one vector in float32."""
    import torch

    return torch.cat([step.parameters[n].grad.float().flatten() for n in sorted(step.parameters)])  # type: ignore[union-attr]


def first_step(step: Step) -> tuple[float, Any]:
    """As `step()`; the loss and the gradients."""
    loss = step.loss()
    loss.backward()
    gradient = gradient_of(step)
    step.optimizer.step()
    step.optimizer.zero_grad()
    return float(loss.detach()), gradient


def gate(provider: Provider, size: Size, device: Any) -> Row:
    """The provider's row after the check on a small problem; whatever it raises makes it absent."""
    from bench import steps
    from bench.report import reason_of

    blank = Row(size.name, provider.name, provider.objective, provider.note, "ok", equal=provider.equal)
    small = size.small()
    try:
        built = provider.build(small, steps.adapted(small, device), device)
        truth = steps.reference(provider.objective, small, steps.adapted(small, device), device)
        losses = []
        for step in (built, truth):
            loss = step.loss()
            loss.backward()
            losses.append(float(loss.detach()))
    except Exception as error:  # whatever a foreign package raises is its reason
        return replace(blank, status="absent", reason=reason_of(error))
    assert built.parameters.keys() == truth.parameters.keys()
    found, expected = (gradient_of(step) for step in (built, truth))
    loss_error = abs(losses[0] - losses[1]) / abs(losses[1])
    gradient_error = float((found - expected).norm() / expected.norm())
    row = replace(blank, loss_error=loss_error, gradient_error=gradient_error)
    if loss_error > TOLERANCE[size.dtype][0] or gradient_error > TOLERANCE[size.dtype][1]:
        reason = f"loss off by {loss_error:.1e}, gradients by {gradient_error:.1e}"
        return replace(row, status="wrong", reason=reason)
    return row


def weighed(row: Row, step: Step, timing: Any, size: Size, device: Any, rate: float) -> Row:
    """The row with its times and what one step holds."""
    from bench import measure, steps

    resident = measure.peak_bytes(step, device) if device.type == "cpu" else None
    return replace(
        row,
        p20_ms=timing.p20,
        p50_ms=timing.p50,
        p80_ms=timing.p80,
        runs=timing.runs,
        pairs_per_second=1e3 * size.pairs / timing.p50,
        chip_share=1e3 * steps.arithmetic(size, row.objective) / timing.p50 / rate,
        peak_mib=measure.peak_tensor_bytes(step, device) / 2**20,
        plan_mib=step.planned and step.planned / 2**20,
        resident_mib=None if resident is None else resident / 2**20,
    )


def run(
    size: Size,
    wanted: list[str],
    device: Any,
    seconds: float,
    rate: float,
    profile: bool = False,
    keep: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Gate, warm up, compare, time in turns and weigh. A provider that fails at full size is a row, and the rest goes on.

    On a GPU each is timed alone once it is warm, too, and `keep` is given what there is: a run that is cut off leaves that.
    """
    import torch

    from bench import kinds, measure, steps
    from bench.report import reason_of

    rows: dict[str, Row] = {}
    ready: dict[str, Step] = {}
    first: dict[str, tuple[float, Any]] = {}  # of an objective: loss and gradient
    models: dict[bool, Any] = {}  # one for those that change its layers, one for the rest
    for provider in steps.providers(device.type):
        if wanted and not any(provider.name.startswith(word) for word in wanted):
            continue
        row = replace(gate(provider, size, device), load=measure.load())
        if row.status == "ok":
            print(f"warming up {provider.name}", file=sys.stderr, flush=True)
            own = provider.own_layers
            model = models[own] = steps.moved(models[own]) if own in models else steps.adapted(size, device)
            try:
                step = provider.build(size, model, device)
                loss, gradient = first_step(step)
            except Exception as failure:  # out of memory, mostly
                rows[provider.name] = replace(row, status="failed", reason=reason_of(failure))
                model.zero_grad()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            expected, direction = first.setdefault(provider.objective, (loss, gradient))
            off = abs(loss - expected) / abs(expected)
            turned = float((gradient - direction).norm() / direction.norm())
            row = replace(row, full_loss_error=off, full_gradient_error=turned)
            if off > FULL_TOLERANCE[size.dtype][0] or turned > FULL_TOLERANCE[size.dtype][1]:
                reason = f"at full size the loss is off by {off:.1e}, gradients by {turned:.1e}"
                row = replace(row, status="wrong", reason=reason)
            else:
                ready[provider.name] = step
                if device.type == "cuda":
                    alone = measure.interleave({"alone": step}, device=device, seconds=0.0, least=3, most=3)["alone"]
                    row = weighed(row, step, alone, size, device, rate)
        rows[provider.name] = row
        keep(list(rows.values()))
    timings = measure.interleave(ready, device=device, seconds=seconds, title="steps")
    for name, step in ready.items():
        rows[name] = weighed(rows[name], step, timings[name], size, device, rate)
        if profile:
            from bench.kernels import kernels_of

            rows[name] = replace(rows[name], kinds=kinds.by_kind(kernels_of(step, device)))
        keep(list(rows.values()))
    return list(rows.values())


def _ours(row: Row) -> bool:
    return row.provider.split(",")[0].endswith((" shared", " padded"))


def print_table(rows: list[Row]) -> None:
    """Times, throughput and memory, and each next to the usual code and to TRL at its best."""
    by_name = {row.provider: row for row in rows if row.p50_ms is not None}
    usual = by_name.get("synpo usual") or by_name.get("synpo usual, kept")
    trl = by_name.get("dpo trl rows") or by_name.get("dpo trl")
    print(
        f"\n{'provider':<18} {'p50 ms':>9} {'p20':>9} {'p80':>9} {'runs':>5} {'pairs/s':>8} {'% chip':>7} {'x usual':>8} "
        f"{'x trl':>7} {'x equal':>8} "
        f"{'peak MiB':>9} {'% plan':>7} {'% usual':>8} {'% trl':>7} {'resident':>9} {'loss err':>9} {'grad err':>9}"
    )
    for row in rows:
        if row.p50_ms is None:
            print(f"{row.provider:<18} {row.status}: {row.reason}")
            continue
        planned = f"{100 * row.peak_mib / row.plan_mib:.0f}" if row.peak_mib and row.plan_mib else "-"
        peers = [usual, trl]
        faster = [f"{p.p50_ms / row.p50_ms:.2f}" if p and p.p50_ms else "-" for p in (*peers, by_name.get(row.equal))]
        smaller = [
            f"{100 * row.peak_mib / peer.peak_mib:.0f}" if peer and peer.peak_mib and row.peak_mib else "-"
            for peer in peers
        ]
        print(
            f"{row.provider:<18} {row.p50_ms:9.0f} {row.p20_ms:9.0f} {row.p80_ms:9.0f} {row.runs:5d} "
            f"{row.pairs_per_second:8.3f} {100 * (row.chip_share or 0):7.1f} {faster[0]:>8} {faster[1]:>7} {faster[2]:>8} "
            f"{'-' if row.peak_mib is None else format(row.peak_mib, '.0f'):>9} {planned:>7} {smaller[0]:>8} {smaller[1]:>7} "
            f"{'-' if row.resident_mib is None else format(row.resident_mib, '.0f'):>9} "
            f"{row.loss_error:9.1e} {row.gradient_error:9.1e}"
        )
    if any((row.p80_ms or 0.0) > 1.5 * (row.p20_ms or 0.0) for row in by_name.values()):
        print("the machine was too busy for these times: some spread by more than half (p80 / p20)")
    for row in rows:
        if row.kinds:
            print(f"\n{row.provider}, one step by kind")
            for kind, (ms, launches) in row.kinds.items():
                print(f"{ms:12.1f} ms {launches:7d}  {kind}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("hidden", "layers", "vocab", "pairs"):
        parser.add_argument(f"--{name}", type=int, help=" or ".join(f"{d[name]} on {k}" for k, d in DEFAULTS.items()))
    parser.add_argument("--dtype", choices=sorted(TOLERANCE), help="float32 on cpu or bfloat16 on cuda")
    parser.add_argument("--prompt", type=int, default=2560, help="tokens of the prompt (2560)")
    parser.add_argument("--answer", type=int, default=300, help="tokens of each answer (300)")
    parser.add_argument("--providers", nargs="+", default=[], metavar="NAME", help="those whose names begin so (all)")
    parser.add_argument("--device", help="cuda where there is one")
    parser.add_argument("--threads", type=int, help="torch's threads (torch's own choice)")
    parser.add_argument("--time-budget", type=float, default=150.0, help="seconds of timing (150), three runs at least")
    parser.add_argument("--profile", action="store_true", help="print one more step of each by kind of kernel")
    parser.add_argument("--note", default="", help="a remark to keep beside the figures")
    parser.add_argument("--out", type=Path, help="path without suffix (bench/results/<date>_<chip>_step)")
    options = parser.parse_args(arguments)

    from bench import measure  # before torch

    import torch  # isort: skip

    from bench import report
    from bench.steps import Size

    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    given = {name: value for name in DEFAULTS["cpu"] if (value := getattr(options, name)) is not None}
    size = Size(prompt=options.prompt, answer=options.answer, **DEFAULTS[device.type] | given)  # type: ignore[arg-type]
    facts = measure.machine(device)
    if options.note:
        facts["note"] = options.note
    for key, value in facts.items():
        print(f"{key:20} {value}")
    print(size.name, flush=True)
    rate = measure.product_rate(device, getattr(torch, size.dtype))
    facts["product"] = f"{rate / 1e12:.3g} TFLOP/s, {size.dtype}"
    print(f"{'product':20} {facts['product']}", flush=True)
    out = options.out or Path(__file__).parent / "results" / f"{facts['date']}_{measure.chip_slug(device)}_step"

    def keep(rows: list[Row]) -> None:
        report.write(out, facts, [asdict(row) for row in rows], [])

    rows = run(size, options.providers, device, options.time_budget, rate, options.profile, keep)
    print_table(rows)
    print(f"written: {out}.json, .csv")
    return int(any(row.status == "wrong" or row.status in ("absent", "failed") and _ours(row) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
