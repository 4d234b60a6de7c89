"""The smoke test of every path: a process that dies costs the problem that it was at, and no other."""

from __future__ import annotations

import math
import os
from functools import partial

import pytest

from bench import sanitize


def test_a_problem_that_kills_its_process_is_named_and_the_rest_goes_on() -> None:
    todo = {"a": partial(float, 0.5), "dies": partial(os._exit, 7), "raises": partial(math.sqrt, -1.0)}
    todo |= {"nan": partial(float, "nan"), "b": partial(float, 0.25)}
    found = dict(sanitize.solved(todo, jobs=2))
    assert found["a"] == 0.5 and found["b"] == 0.25 and found["nan"] == math.inf
    assert found["dies"] == "the process died with exit code 7"
    assert found["raises"].startswith("ValueError: ")


def test_right_and_wrong_on_a_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--backends", "chunked"]
    assert sanitize.main(options) == 0
    assert "0 of 77 problems are wrong; 0 left out" in capsys.readouterr().out
    monkeypatch.setattr(sanitize, "check_pairs", lambda *_: 3.0)
    assert sanitize.main([*options, "--seconds", "100"]) == 1
    assert "WRONG    3.000 tolerances  chunked pairs packed=False" in capsys.readouterr().out
