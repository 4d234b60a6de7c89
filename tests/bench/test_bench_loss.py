"""The loss benchmark: its float64 truth, its gate, what it writes, and its measuring."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import cases, loss, measure, peers, truth
from synpo_kernels.reference import naive_logprobs, naive_synpo

CPU = torch.device("cpu")
TINY = "64x300x32:float32"
NAIVE = next(provider for provider in peers.providers() if provider.name == "naive")


def provider(name: str, function: peers.LossFunction) -> peers.Provider:
    return peers.Provider(name, lambda device: function, "for this test")


def naive(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return NAIVE.load(CPU)(hidden, weight, labels)


class Swollen(torch.autograd.Function):
    """The right value with a gradient a tenth too large."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, upstream: Tensor) -> Tensor:
        return 1.1 * upstream


def refuses(device: torch.device) -> peers.LossFunction:
    raise ImportError("No module named 'nobody'")


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    """Ten runs say as much here as a hundred, and the rate of copies and the plot are tests of their own."""
    interleave = measure.interleave
    monkeypatch.setattr(measure, "interleave", lambda runs, **options: interleave(runs, **{"most": 10} | options))
    monkeypatch.setattr(measure, "copy_rate", lambda device, seconds: 1e9)


def measured(monkeypatch, tmp_path: Path, *extra: peers.Provider, head: str = "frozen") -> tuple[int, dict[str, dict]]:
    """Exit code and rows by provider of a run over a tiny shape."""
    monkeypatch.setattr(peers, "providers", lambda: iter([NAIVE, *extra]))
    arguments = ["--shapes", TINY, "--head", head, "--device", "cpu", "--time-budget", "90", "--out", f"{tmp_path}/out"]
    code = loss.main(arguments)
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    return code, {row["provider"]: row for row in rows}


@pytest.mark.parametrize("objective", truth.OBJECTIVES)
def test_truth_is_autograd_of_full_logits(objective: str) -> None:
    problem = cases.make(cases.Case(64, 50, 16, "float64", ignored=0.25), CPU).with_head(True)
    logps = naive_logprobs(problem.hidden, problem.weight, problem.labels)
    value = truth.OBJECTIVES[objective](logps, problem.labels)
    value.backward()
    found = truth.truth(problem, objective, want_weight=True)
    assert found.loss == pytest.approx(value.item(), rel=1e-12)
    assert truth.error(found.hidden, problem.hidden.grad) < 1e-12
    assert truth.error(found.weight, problem.weight.grad) < 1e-12
    if objective == "synpo":
        assert found.loss == pytest.approx(naive_synpo(problem.hidden, problem.weight, problem.labels).loss.item())


def test_truth_in_blocks_of_rows(monkeypatch) -> None:
    problem = cases.make(cases.Case(64, 50, 16, "float64"), CPU)
    whole = truth.truth(problem, "synpo", want_weight=True)
    monkeypatch.setattr(truth, "BLOCK_ROWS", 24)
    blocks = truth.truth(problem, "synpo", want_weight=True)
    assert truth.error(blocks.hidden, whole.hidden) < 1e-12
    assert truth.error(blocks.weight, whole.weight) < 1e-12


def test_first_pair_has_its_share_of_the_gradient() -> None:
    problem = cases.make(cases.Case(96, 50, 16, "float64", pairs=3), CPU)
    whole, pair = truth.truth(problem, "synpo").hidden, truth.truth(truth.first_pair(problem), "synpo").hidden
    assert truth.error(pair / 3, whole[[0, 3]]) < 1e-12


def test_inputs_are_peaked_and_ignored_as_said() -> None:
    problem = cases.make(cases.Case(512, 2000, 128, "bfloat16", ignored=0.25), CPU)
    kept = problem.labels != cases.IGNORE_INDEX
    assert int(kept.sum()) == problem.case.kept == 384
    probabilities = naive_logprobs(problem.hidden.float(), problem.weight.float(), problem.labels)[kept].exp()
    assert 0.4 < float((probabilities > 0.9).float().mean()) < 0.85
    assert float((probabilities < 0.5).float().mean()) > 0.1


def test_peaked_inputs_meet_denormal_numbers_and_ours_pass_the_gate() -> None:
    case = cases.SWEEPS["cpu-peaked"][-1]
    assert case.name.endswith("bfloat16 peaked") and case.small().spread == case.spread
    problem = cases.make(case.small(), CPU)
    logits = problem.hidden.detach().double().flatten(0, 1) @ problem.weight.double().T
    labels = problem.labels.flatten()
    gap = (logits - logits.gather(1, labels.clamp(min=0)[:, None]))[labels >= 0]
    assert ((gap < -87.34) & (gap > -103.3)).double().mean() > 0.15
    rows = loss.Bench(CPU, ["synpo chunked", "synpo cpu"]).gate(case, "frozen", "ours")
    assert {row.status for row in rows} <= {"ok", "absent"} and any(row.status == "ok" for row in rows)


def test_a_run_prints_and_writes_everything(monkeypatch, tmp_path, capsys) -> None:
    ours = next(p for p in peers.providers() if p.name == "synpo chunked")
    code, rows = measured(monkeypatch, tmp_path, ours, peers.Provider("nobody", refuses, "absent"), head="trained")
    assert code == 0
    for name in ("naive", "synpo chunked"):
        row = rows[name]
        assert row["status"] == "ok" and row["runs"] >= 3
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["dx_error"] < 1e-4 and row["dw_error"] < 1e-4 and row["pair_dx_error"] < 1e-4
        assert row["over_floor"] > 0 and row["extra_mib"] >= 0
    assert rows["products"]["status"] == "floor"
    assert rows["nobody"]["status"] == "absent" and "No module named 'nobody'" in rows["nobody"]["reason"]
    out = capsys.readouterr().out
    assert "absent: nobody" in out and "synpo chunked" in out
    with (tmp_path / "out.csv").open() as file:
        assert {row["provider"] for row in csv.DictReader(file)} == set(rows)
    assert (tmp_path / "out.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "out.json").read_text())["machine"]["torch"] == torch.__version__
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "out.json", "out.png"]


def test_ours_are_timed_before_others_are_imported(monkeypatch, tmp_path) -> None:
    """So a run that is cut off while others compile has told what it found of ours; the products are in both turns."""
    written = tmp_path / "out.json"

    def late(device: torch.device) -> peers.LossFunction:
        turns = [row["turns"] for row in json.loads(written.read_text())["rows"]]
        assert turns == ["ours"] * 3, "ours are not yet written"
        return naive

    ours = next(p for p in peers.providers() if p.name == "synpo chunked")
    monkeypatch.setattr(peers, "providers", lambda: iter([peers.Provider("late", late, ""), ours]))
    options = ["--head", "frozen", "--device", "cpu", "--time-budget", "90", "--out", f"{tmp_path}/out"]
    assert loss.main(["--shapes", TINY, *options]) == 0
    rows = json.loads(written.read_text())["rows"]
    assert [(row["provider"], row["turns"]) for row in rows] == [
        ("products whole", "ours"), ("products", "ours"), ("synpo chunked", "ours"),
        ("products whole", "peers"), ("products", "peers"), ("late", "peers"),
    ]  # fmt: skip
    for turns in loss.TURNS:
        assert min(row["over_floor"] for row in rows if row["turns"] == turns) == 1.0


def test_others_that_compile_for_too_long_leave_time_for_the_rest(monkeypatch) -> None:
    monkeypatch.setattr(peers, "providers", lambda: iter([NAIVE]))
    bench = loss.Bench(CPU, [])
    problem = cases.make(cases.parse(TINY)[0], CPU)
    rows = bench.measure(problem, "frozen", "peers", 0.01, until=time.monotonic() - 1)
    assert [(row.provider, row.status) for row in rows] == [
        ("products whole", "floor"), ("products", "floor"), ("naive", "left out"),
    ]  # fmt: skip


def test_a_wrong_provider_shows_no_speed(monkeypatch, tmp_path, capsys) -> None:
    def wrong_gradient(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return naive(Swollen.apply(hidden), weight, labels)

    def wrong_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return naive(hidden, weight, labels) - 1.0

    def wrong_at_full_size(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        small = len(weight) == 4224
        return naive(hidden if small else Swollen.apply(hidden), weight, labels)

    def not_a_number(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return naive(hidden, weight, labels) * torch.nan

    def raises(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        raise RuntimeError("no kernel image")

    extra = [provider(function.__name__, function) for function in (wrong_gradient, wrong_loss, wrong_at_full_size)]
    extra += [provider("not_a_number", not_a_number), provider("raises", raises)]
    code, rows = measured(monkeypatch, tmp_path, *extra)
    assert code == 0  # peers may be wrong
    assert rows["naive"]["p50_ms"] > 0
    for each in extra:
        assert rows[each.name]["p50_ms"] is None and rows[each.name]["runs"] == 0
        assert rows[each.name]["status"] == ("failed" if each.name == "raises" else "wrong")
    assert rows["wrong_gradient"]["dx_error"] == pytest.approx(0.1, rel=1e-2)
    assert "full size" in rows["wrong_at_full_size"]["reason"] and "no kernel image" in rows["raises"]["reason"]
    out = capsys.readouterr().out
    assert "wrong_gradient     wrong: dX off by 1.0e-01; 2e-03 is allowed" in out


def test_append_keeps_other_cases(monkeypatch, tmp_path) -> None:
    measured(monkeypatch, tmp_path)
    measured(monkeypatch, tmp_path)
    other = ["--shapes", "32x300x32:float32", "--head", "frozen", "--device", "cpu", "--time-budget", "90", "--append"]
    loss.main([*other, "--out", f"{tmp_path}/out"])
    loss.main([*other, "--out", f"{tmp_path}/out"])
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["case"], row["provider"]) for row in rows] == [
        (f"{n}x300x32 float32", name) for n in (64, 32) for name in ("products whole", "products", "naive")
    ]


def test_the_exit_code_tells_that_ours_is_wrong(monkeypatch, tmp_path) -> None:
    code, _ = measured(monkeypatch, tmp_path, provider("synpo broken", lambda x, w, y: naive(x, w, y) * 2))
    assert code == 1


def test_what_does_not_fit_the_budget_is_left_out(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(peers, "providers", lambda: iter([NAIVE]))
    loss.main(["--shapes", TINY, "--device", "cpu", "--time-budget", "0", "--out", str(tmp_path / "out")])
    left_out = json.loads((tmp_path / "out.json").read_text())["left_out"]
    assert len(left_out) == 2 and "time budget" in left_out[0]


def test_a_case_that_would_outlast_the_budget_is_not_begun(monkeypatch, tmp_path) -> None:
    """The first took 0.5 s, 0.2 s of them by plan for timing: 0.2 s are left, and 0.3 s are needed beside the timing."""
    begun = []

    def slow(bench: loss.Bench, problem: cases.Problem, head: str, *rest: object) -> list[loss.Row]:
        begun.append(head)
        time.sleep(0.5)
        return []

    monkeypatch.setattr(peers, "providers", lambda: iter([NAIVE]))
    monkeypatch.setattr(loss.Bench, "measure", slow)
    assert loss.main(["--shapes", TINY, "--device", "cpu", "--time-budget", "0.7", "--out", str(tmp_path / "out")]) == 0
    assert begun == ["frozen"]
    (left_out,) = json.loads((tmp_path / "out.json").read_text())["left_out"]
    assert "trained head, peers: the time budget of 1 s was spent" in left_out


def test_turns_are_shuffled_and_a_slow_run_does_not_starve_the_rest() -> None:
    """A chip at the limit of its power gives what the run before has left: nobody always follows the same one."""
    order: list[str] = []

    def slow() -> None:
        order.append("slow")
        time.sleep(0.02)

    runs = {"slow": slow, "a": lambda: order.append("a"), "b": lambda: order.append("b")}
    timings = measure.interleave(runs, device=CPU, seconds=0.12, least=6, most=50)
    rounds = [order[i : i + 3] for i in range(0, 18, 3)]
    assert all(sorted(names) == ["a", "b", "slow"] for names in rounds)
    assert all(len({order[i - 1] for i in range(1, 18) if order[i] == name}) > 1 for name in runs)
    assert timings["slow"].runs == 6 and timings["slow"].p50 >= 20
    assert timings["a"].runs > 6 and timings["a"].p80 < 20


def test_percentiles() -> None:
    assert measure.Timing.of([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == measure.Timing(2.0, 3.5, 5.0, 6)


def test_peak_memory_of_a_call() -> None:
    def run() -> float:
        return sum(float(torch.ones(size << 20, dtype=torch.uint8)[0]) for size in (36, 60))  # glibc keeps up to 32

    peak = measure.peak_bytes(run, CPU)
    if peak is None:
        pytest.skip("this system does not tell its peak memory")
    assert 59 << 20 <= peak < 80 << 20  # the first buffer is gone before the second is made
    small = measure.peak_bytes(lambda: torch.ones(1 << 20, dtype=torch.uint8), CPU)
    assert small is not None and small < 8 << 20  # an earlier peak is forgotten


def test_shapes_on_the_command_line() -> None:
    assert cases.parse("cpu") == cases.SWEEPS["cpu"]
    assert cases.parse("1024x32000x4096") == [cases.Case(1024, 32000, 4096, "bfloat16")]
    assert cases.parse("8192x500x64:float16")[0].pairs == 4
    several = [case.name for case in cases.parse("64,128x500x32,64:float32")]
    assert several == [f"{n}x500x{d} float32" for n in (64, 128) for d in (32, 64)]
    for wrong in ("1024x32000", "8x8x8:float7", "66x100x8", "everything"):
        with pytest.raises(ValueError, match="neither a sweep|not a dtype|do not divide"):
            cases.parse(wrong)
    for sweep in cases.SWEEPS.values():
        assert all(case.small().kept < case.small().rows for case in sweep)
