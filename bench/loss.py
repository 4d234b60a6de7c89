"""The loss from hidden states, forward and backward: ours beside the usual code and other people's kernels.

    python -m bench.loss [--smoke] [--shapes gpu 1024x32000x4096:bfloat16] [--providers synpo naive]
                         [--head frozen trained] [--device cuda] [--time-budget 240] [--out bench/results/today]

A provider first has to reproduce loss and gradients of a small problem of the same kind in float64, then the gradient of
one pair of the very problem that is timed; one that does not prints no speed. Times are of one forward and backward,
providers taking turns: ours first, on all shapes, then the others', each time beside the products alone, by which the two are
compared. Writes OUT.json and OUT.csv, anew after every table, and OUT.png at the end. See bench/README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from bench import measure  # before torch

import torch  # isort: skip
from torch import Tensor  # isort: skip

from bench import cases, floor, peers, report, truth
from bench.report import Row, reason_of

WARM_UPS = {"cpu": 1, "cuda": 2}
TURNS = ("ours", "peers")  # timed in this order: compiling what belongs to others eats none of the time of ours


class Abort(RuntimeError):
    """The CUDA context is lost: nothing more can be measured in this process."""


def step(loss_of: peers.LossFunction, problem: cases.Problem) -> Tensor:
    """One forward and backward; the gradients are left in the leaves of `problem`.

    The labels are a fresh alias: a peer marks the tensor object it is given for its compiler, which would recompile others.
    """
    problem.hidden.grad = problem.weight.grad = None
    loss = loss_of(problem.hidden, problem.weight, problem.labels.detach())
    loss.backward()
    return loss


def attempt(run: Callable[[], Row | None], row: Row, status: str) -> Row | None:
    """`run`'s row (None: go on). Peers may raise anything, which becomes their row; a lost CUDA context ends the run."""
    try:
        found = run()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return found
    except Exception as error:
        if torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as lost:
                raise Abort(f"{row.provider} lost the CUDA context on {row.case}: {reason_of(error)}") from lost
        return replace(row, status=status, reason=reason_of(error))


class Bench:
    """One device, the providers that loaded on it, and the rows so far."""

    def __init__(self, device: torch.device, wanted: list[str]) -> None:
        self.device = device
        self.rows: list[Row] = []
        self.loaded: dict[str, tuple[peers.Provider, peers.LossFunction]] = {}
        self.absent: dict[str, str] = {}
        self.gated: dict[tuple[cases.Case, str, str], list[Row]] = {}
        chosen = [p for p in peers.providers() if not wanted or any(p.name.startswith(word) for word in wanted)]
        if not chosen:
            raise SystemExit(f"no provider is called {wanted}; there are {[p.name for p in peers.providers()]}")
        self.chosen = {turns: [p for p in chosen if p.ours == (turns == "ours")] for turns in TURNS}

    def load(self, turns: str) -> None:
        """Import the providers of `turns`, once: others' packages take a while."""
        for provider in self.chosen[turns]:
            if provider.name in self.loaded or provider.name in self.absent:
                continue
            try:
                self.loaded[provider.name] = provider, provider.load(self.device)
            except Exception as error:  # whatever a foreign package raises on import is its reason to be absent
                self.absent[provider.name] = reason_of(error)
                print(f"absent: {provider.name:18} {reason_of(error)}", flush=True)

    def gate(self, case: cases.Case, head: str, turns: str, until: float = math.inf) -> list[Row]:
        """Every loaded provider against float64 on a small problem of the same kind; done once for a kind."""
        key = case.small(), head, turns
        if key not in self.gated:
            problem = cases.make(case.small(), self.device).with_head(head == "trained")
            self.gated[key] = self._gate(problem, head, turns, until)
        return [replace(row, case=case.name) for row in self.gated[key]]

    def _gate(self, problem: cases.Problem, head: str, turns: str, until: float) -> list[Row]:
        self.load(turns)
        case = problem.case
        expected: dict[str, truth.Truth] = {}
        rows = []
        for provider in self.chosen[turns]:
            blank = Row(case.name, head, provider.name, provider.objective, "ok", turns=turns)
            if provider.name in self.absent or head not in provider.heads:
                reason = self.absent.get(provider.name, f"not for a {head} head")
                rows.append(replace(blank, status="absent", reason=reason))
                continue
            loss_of = self.loaded[provider.name][1]

            def check(
                blank: Row = blank, objective: str = provider.objective, loss_of: peers.LossFunction = loss_of
            ) -> Row:
                if objective not in expected:
                    expected[objective] = truth.truth(problem, objective, want_weight=problem.trained)
                found = truth.compare(step(loss_of, problem), problem, expected[objective])
                complaint = found.complaint(case.dtype)
                return replace(
                    blank,
                    status="wrong" if complaint else "ok",
                    reason=complaint or "",
                    loss_error=found.loss,
                    dx_error=found.hidden,
                    dw_error=found.weight,
                )

            rows.append(_late(blank, until) or attempt(check, blank, "failed") or blank)
        return rows

    def measure(
        self, problem: cases.Problem, head: str, turns: str, seconds: float, until: float = math.inf
    ) -> list[Row]:
        """Gate, warm up, check at full size, time and weigh every provider of `turns` on `problem`; the rows that are new.

        until: when (time.monotonic) to begin with no other provider, which may compile for long, but to time those that are warm.
        """
        case = problem.case
        problem = problem.with_head(head == "trained")
        load = measure.load()
        rows = {row.provider: replace(row, load=load) for row in self.gate(case, head, turns, until)}
        pair = truth.first_pair(problem)
        objectives = {row.objective for row in rows.values() if row.status == "ok"}
        expected = {objective: truth.truth(pair, objective).hidden / case.pairs for objective in objectives}
        for name, row in rows.items():
            if row.status != "ok":
                continue
            provider, loss_of = self.loaded[name]

            def warm(row: Row = row, objective: str = provider.objective, loss_of: peers.LossFunction = loss_of) -> Row:
                for _ in range(WARM_UPS[self.device.type]):
                    step(loss_of, problem)
                assert problem.hidden.grad is not None
                off = truth.error(problem.hidden.grad[[0, case.pairs]], expected[objective])
                if off > truth.TOLERANCE[case.dtype]:
                    return replace(row, status="wrong", reason=f"dX off by {off:.1e} at full size", pair_dx_error=off)
                return replace(row, pair_dx_error=off)

            print(f"warming up {name} on {case.name}, {head} head", file=sys.stderr, flush=True)
            rows[name] = _late(row, until) or attempt(warm, row, "failed") or row
        expected.clear()
        timed = [name for name, row in rows.items() if row.status == "ok"]
        runs = {name: partial(step, self.loaded[name][1], problem) for name in timed}
        products = floor.products(problem)
        for run in products.values():
            run()
        title = f"{case.name} {head}"
        timings = measure.interleave({**products, **runs}, device=self.device, seconds=seconds, title=title)
        least = min(timings[name].p50 for name in products)
        found = []
        for name in products:
            blank = Row(case.name, head, name, "", "floor", "matrix products alone", turns, load=load)
            found.append(_timed(blank, timings[name], least))
        del products
        gradients = problem.hidden.nbytes + (problem.weight.nbytes if problem.trained else 0)
        for name, row in rows.items():
            if name in runs:
                problem.hidden.grad = problem.weight.grad = None
                row = _timed(row, timings[name], least)
                peak = measure.peak_bytes(runs[name], self.device)
                if peak is not None:
                    row = replace(row, peak_mib=peak / 2**20, extra_mib=max(0, peak - gradients) / 2**20)
            found.append(row)
        problem.hidden.grad = problem.weight.grad = None
        self.rows += found
        return found


def _late(row: Row, until: float) -> Row | None:
    return replace(row, status="left out", reason="the time was spent") if time.monotonic() > until else None


def _timed(row: Row, timing: measure.Timing, least: float) -> Row:
    return replace(
        row, p20_ms=timing.p20, p50_ms=timing.p50, p80_ms=timing.p80, runs=timing.runs, over_floor=timing.p50 / least
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.loss", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="two tiny shapes, two seconds each: does it run at all")
    parser.add_argument(
        "--shapes",
        nargs="+",
        metavar="SHAPE",
        help=f"NxVxD[:dtype], several numbers as 256,1024x32000x512; or a sweep: {', '.join(cases.SWEEPS)} (gpu or cpu)",
    )
    parser.add_argument("--providers", nargs="+", default=[], metavar="NAME", help="those whose names begin so (all)")
    parser.add_argument("--head", nargs="+", default=list(peers.HEADS), choices=peers.HEADS, help="(both)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="torch's threads (torch's own choice)")
    parser.add_argument(
        "--time-budget", type=float, default=240.0, help="seconds in all; what no longer fits is left out"
    )
    parser.add_argument("--note", default="", help="a remark to keep beside the figures")
    parser.add_argument("--out", type=Path, help="path without suffix (bench/results/<date>_<chip>)")
    parser.add_argument(
        "--append", action="store_true", help="keep the cases that OUT.json holds and this run does not"
    )
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    try:
        texts = ["smoke"] if options.smoke else options.shapes or ["gpu" if device.type == "cuda" else "cpu"]
        wanted = [case for text in texts for case in cases.parse(text)]
    except ValueError as error:
        parser.error(str(error))
    facts = measure.machine(device)
    if options.note:
        facts["note"] = options.note
    out = options.out or Path(__file__).parent / "results" / f"{facts['date']}_{measure.chip_slug(device)}"
    for key, value in facts.items():
        print(f"{key:20} {value}")
    bench = Bench(device, options.providers)
    if options.append and out.with_name(out.name + ".json").exists():
        again = {(case.name, head) for case in wanted for head in options.head}
        kept = json.loads(out.with_name(out.name + ".json").read_text())["rows"]
        bench.rows = [Row(**row) for row in kept if (row["case"], row["head"]) not in again]
    return run(bench, wanted, options.head, options.time_budget, facts, out)


def run(
    bench: Bench, wanted: list[cases.Case], heads: list[str], budget: float, facts: dict[str, str], out: Path
) -> int:
    """Measure every case with every head until the budget is spent; 0 where all that loaded of ours was right."""
    end = time.monotonic() + budget
    facts["copy"] = (
        f"{measure.copy_rate(bench.device, seconds=min(1.0, budget / 20)) / 1e9:.1f} GB/s, bytes read and written"
    )
    left_out: list[str] = []
    todo = [(case, head, turns) for turns in TURNS if bench.chosen[turns] for head in heads for case in wanted]
    aborted = None
    needed: dict[tuple[cases.Case, str], float] = {}  # seconds beyond its timing: compiling, the gate, memory
    for done, (case, head, turns) in enumerate(todo):
        name = f"{case.name}, {head} head"
        begun = time.monotonic()
        left = end - begun
        if left <= needed.get((case, turns), min(needed.values(), default=0.0)):
            left_out.append(f"{name}, {turns}: the time budget of {budget:.0f} s was spent")
            continue
        seconds = 0.5 * left / (len(todo) - done)  # the other half is for warming up, the gate and memory
        try:
            until = begun + 0.5 * left if turns == "peers" else math.inf
            found = bench.measure(cases.make(case, bench.device), head, turns, seconds, until)
        except Abort as lost:
            aborted = str(lost)
            left_out += [f"{case.name}, {head} head, {turns}: {aborted}" for case, head, turns in todo[done:]]
            break
        except (torch.OutOfMemoryError, MemoryError) as error:
            left_out.append(f"{name}, {turns}: {reason_of(error)}")
            continue
        needed[case, turns] = time.monotonic() - begun - seconds
        report.print_table(found, name)
        report.write(out, facts, [asdict(row) for row in bench.rows], left_out)
    report.write(out, facts, [asdict(row) for row in bench.rows], left_out)
    report.plot(out, facts, bench.rows)
    for line in left_out:
        print(f"left out: {line}")
    print(f"written: {out}.json, .csv" + (", .png" if out.with_name(out.name + ".png").exists() else ""))
    if aborted:
        return 3
    return 1 if any(row.ours and row.status in ("wrong", "failed") for row in bench.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
