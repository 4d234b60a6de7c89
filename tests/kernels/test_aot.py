"""Ahead-of-time compilation for GPUs that are not here: the whole table, and that the checks of its report can fail."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed (pip install triton)")

from synpo_kernels import aot
from synpo_kernels.kernels import variants

ROOT = Path(__file__).resolve().parents[2]
HIDDEN = 3584
GROUPS: dict[tuple[int, str], list[variants.Case]] = defaultdict(list)
for case in variants.cases([80, 90, 100], HIDDEN):
    GROUPS[case.arch, "exponentials bf16" if case.name.startswith("exp") and case.dtype == "bf16" else "others"].append(
        case
    )


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "synpo_kernels.aot", *arguments]
    return subprocess.run(command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True)


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Where reports outlive this run: in pytest's own cache, or nowhere if that is switched off."""
    cache = getattr(request.config, "cache", None)
    return tmp_path if cache is None else Path(cache.mkdir("aot"))


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: f"sm_{group[0]} {group[1]}")
def test_every_kernel_compiles_for_every_chip(group, folder) -> None:
    """No spill but in an epilogue, no serialised wgmma, shared memory within the chip.

    What is unchanged since an earlier run is not redone.
    """
    missing = [case.name for case in GROUPS[group] if aot.recall(case, folder) is None]
    if missing:
        done = run("--arch", str(group[0]), "--jobs", "1", "--cache", str(folder), "--only", *missing)
        assert done.returncode == 0, done.stdout + done.stderr
    for case in GROUPS[group]:
        report = aot.recall(case, folder)
        assert report is not None and not report.problems and 0 < report.registers <= 255, (case.name, report)
        if case.kernel.fn.__name__ == "exp_tile_kernel" and case.dtype in ("bf16", "fp16"):
            assert report.marks[0] == {80: "mma", 90: "wgmma", 100: "tcgen05"}[case.arch]
            assert ("tma" in report.marks) == ("described" in case.name)


def test_the_table_holds_what_is_launched() -> None:
    for arch in (80, 90, 100):
        names = [case.name for case in variants.cases([arch], HIDDEN)]
        assert len(names) == len(set(names)) > 30
        assert ("exp described bf16" in names) == (arch >= 90)


def test_interpreter_and_unknown_names_are_refused() -> None:
    done = run(TRITON_INTERPRET="1")
    assert done.returncode == 2 and "unset it" in done.stderr
    done = run("--only", "exp int4")
    assert done.returncode == 2 and "no kernel is called ['exp int4']" in done.stderr


def test_reports_are_kept_for_the_very_same_case(tmp_path, monkeypatch) -> None:
    case = GROUPS[90, "others"][0]
    report = aot.Report(100, 0, 5, ("wgmma", "tma"), ("spills 4 bytes",))
    aot.keep(case, report, tmp_path)
    assert aot.recall(case, tmp_path) == report
    for other in (
        replace(case, arch=100),
        replace(case, dtype="fp32"),
        replace(case, options={**case.options, "num_stages": 7}),
        replace(case, constants={**case.constants, "D": 8}),
        replace(case, types={"x_ptr": "tensordesc<bf16[128,64]>"}),
        replace(case, kernel=GROUPS[90, "others"][-1].kernel),
    ):
        assert aot.recall(other, tmp_path) is None
    monkeypatch.setattr(aot, "_state", lambda: "a kernel was edited")
    assert aot.recall(case, tmp_path) is None
    assert len(list(tmp_path.iterdir())) == 1


GOOD = "ptxas info    : Used 90 registers\n 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"


@pytest.mark.parametrize(
    ("said", "shared", "problem"),
    [
        ("Used 255 registers\n 16 bytes spill stores, 24 bytes spill loads", 0, "spills 40 bytes"),
        (f"info    : (C7515) Potential Performance Loss: wgmma.mma_async\n{GOOD}", 0, "serialises wgmma: C7515"),
        (GOOD, 233_000, "233000 bytes of shared memory, sm_90 has 232448"),
        ("fatal: cannot assemble", 0, "ptxas failed"),
        ("", 0, "ptxas failed"),
        (GOOD, 232_448, None),
    ],
)
def test_verdicts(said, shared, problem) -> None:
    report = aot.judge(90, "wgmma.mma_async", shared, said)
    assert report.marks == ("wgmma",)
    assert aot.judge(90, "", 0, "Used 9 registers\n 16 bytes spill stores, 24 bytes spill loads", 40).problems == ()
    assert report.problems == () if problem is None else any(problem in found for found in report.problems)
