"""The examples run offline in seconds as a user would run them; each compares its losses with naive ones itself."""

import ast
import difflib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from workers import free_port

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def run(name: str, *arguments: str, processes: int = 0) -> str:
    """What an example prints; `processes`: under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-addr", "127.0.0.1"]
    launcher += ["--master-port", free_port()]
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *(launcher if processes else []), str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def figures(line: str) -> list[float]:
    return [float(x) for x in re.findall(r"[-+]?\d+\.\d+", line)]


def test_every_example_is_tested() -> None:
    assert {p.name for p in EXAMPLES.glob("*.py")} == {
        "plain_loop.py",
        "hf_trainer.py",
        "trl_dpo.py",
        "two_gpus.py",
    }


def test_the_plain_loop_learns_with_the_naive_loss_beside_it() -> None:
    assert len((EXAMPLES / "plain_loop.py").read_text().splitlines()) < 60
    steps = [figures(line) for line in run("plain_loop.py").splitlines() if line.startswith("step")]
    assert len(steps) == 20
    assert all(loss == pytest.approx(naive, abs=2e-5) for loss, naive, _ in steps)
    assert steps[-1][2] > steps[0][2] + 0.005


def test_the_trainer_gives_the_same_losses_with_three_lines_changed() -> None:
    steps = [figures(line) for line in run("hf_trainer.py").splitlines() if line.startswith("step")]
    assert len(steps) == 9
    assert all(naive == pytest.approx(fused, rel=1e-5) for naive, fused in steps)
    source = (EXAMPLES / "hf_trainer.py").read_text()
    bodies = {
        node.name: [line for part in node.body if (line := ast.unparse(part))]
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
    }
    lines = {name: "\n".join(body).splitlines() for name, body in bodies.items()}
    changed = difflib.ndiff(lines["NaiveTrainer"], lines["FusedTrainer"])
    assert sum(line.startswith("+ ") for line in changed) == 3


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed (pip install trl)")
def test_trl_gives_the_same_dpo_losses_through_our_kernels() -> None:
    """And SynPO trains in its loop without a reference model, with LoRA and without."""
    steps = [figures(line) for line in run("trl_dpo.py").splitlines() if line.startswith("step")]
    assert len(steps) == 6
    assert all(theirs == pytest.approx(fused, rel=1e-4) for theirs, fused, *_ in steps)
    assert steps[-1][2] < steps[0][2] and steps[-1][3] < steps[0][3]


def test_two_processes_give_the_losses_of_one() -> None:
    runs = [run("two_gpus.py", "--cpu")]
    runs += [run("two_gpus.py", "--cpu", *sharded, processes=2) for sharded in ([], ["--fsdp"])]
    one, *others = ([figures(line)[0] for line in said.splitlines() if line.startswith("step")] for said in runs)
    assert len(one) == 10 and one[-1] < one[0]
    for losses in others:
        assert losses == pytest.approx(one, rel=1e-4)
