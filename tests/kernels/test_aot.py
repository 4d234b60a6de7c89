"""Ahead-of-time compilation for GPUs that are not here, and that the checks of its report can fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from synpo_kernels import aot
from synpo_kernels.kernels.configs import INTERPRETER

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "synpo_kernels.aot", *arguments]
    return subprocess.run(command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True)


def test_main_kernels_compile_for_every_chip() -> None:
    """No spill, no serialised wgmma, shared memory within the chip; tensor cores used. The whole set: run the module."""
    done = run("--only", "exp bf16", "exact bf16")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {tuple(line.split()[:3]): line for line in done.stdout.splitlines() if " bf16 " in line}
    assert len(rows) == 6
    for chip, instruction in (("sm_80", "mma"), ("sm_90", "wgmma"), ("sm_100", "tcgen05")):
        assert rows["exp", "bf16", chip].split()[-1] == instruction
    assert done.stdout.splitlines()[-1] == "6 of 6 kernels are good"


def test_interpreter_and_unknown_names_are_refused() -> None:
    done = run(TRITON_INTERPRET="1")
    assert done.returncode == 2 and "unset it" in done.stderr
    done = run("--only", "exp int4")
    assert done.returncode == 2 and "no kernel is called ['exp int4']" in done.stderr


@pytest.mark.parametrize(
    ("said", "code", "shared", "problem"),
    [
        ("Used 255 registers\n 16 bytes spill stores, 24 bytes spill loads", 0, 0, "spills 40 bytes"),
        (
            "info    : (C7515) Potential Performance Loss: wgmma.mma_async\nUsed 90 registers",
            0,
            0,
            "serialises wgmma: C7515",
        ),
        ("Used 90 registers", 0, 233_000, "233000 bytes of shared memory, sm_90 has 232448"),
        ("fatal: cannot assemble", 255, 0, "ptxas failed"),
    ],
)
def test_verdicts(said, code, shared, problem, monkeypatch) -> None:
    monkeypatch.setattr(aot, "_assemble", lambda ptx, arch: (code, said))
    case = aot.Case("x", None, 90, "bf16", INTERPRETER, {})
    report = aot._judge(case, "wgmma.mma_async", shared)
    assert any(problem in found for found in report.problems), report
    assert report.marks == ("wgmma",)


def test_a_good_verdict(monkeypatch) -> None:
    monkeypatch.setattr(
        aot, "_assemble", lambda ptx, arch: (0, "0 bytes spill stores, 0 bytes spill loads\nUsed 90 registers")
    )
    report = aot._judge(aot.Case("x", None, 90, "bf16", INTERPRETER, {}), "", 1000)
    assert report.problems == () and report.registers == 90


def test_every_launch_configuration_is_compiled() -> None:
    """The set holds each tile of each chip, for each input format."""
    from synpo_kernels.kernels.configs import CHIPS, EXACT

    compiled = {(case.arch // 10, case.config) for case in aot.cases([80, 90, 100], 3584)}
    wanted = {(major, tile) for major, chip in CHIPS.items() for tile in (*vars(chip).values(), EXACT)}
    assert compiled == wanted
