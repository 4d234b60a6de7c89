"""Bars on a terminal, lines elsewhere: few, whole, and without control codes."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from synpo import progress
from synpo.progress import Bar

ROOT = Path(__file__).resolve().parent.parent


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds by which both clocks are ahead."""
    ahead, real, wall = [0.0], progress.time.monotonic, __import__("tqdm").std.time
    monkeypatch.setattr(progress.time, "monotonic", lambda: real() + ahead[0])
    monkeypatch.setattr("tqdm.std.time", lambda: wall() + ahead[0])
    return ahead


def test_a_file_gets_a_line_now_and_then_and_one_at_the_end(clock: list[float]) -> None:
    file = io.StringIO()
    for _ in Bar(range(1000), desc="captions", unit="video", file=file):
        clock[0] += 1.0
    lines = file.getvalue().splitlines()
    assert 25 < len(lines) <= 1000 // 30, "one in 30 seconds, or in a twentieth of the time gone"
    assert "\r" not in file.getvalue()
    assert re.fullmatch(r"captions: \d+ of 1000 videos, 00:3\d gone, 16:\d\d left, 1(\.0\d)? videos/s", lines[0])
    assert re.fullmatch(r"captions: 1000 of 1000 videos, 16:40 gone, \S+ videos/s", lines[-1])


def test_long_runs_have_lines_further_apart(clock: list[float]) -> None:
    file = io.StringIO()
    for _ in Bar(range(3600), unit="step", file=file):
        clock[0] += 10.0
    assert 100 < len(file.getvalue().splitlines()) < 170, "in ten hours"


def test_figures_behind_a_bar_make_no_lines_of_their_own(clock: list[float]) -> None:
    file = io.StringIO()
    with Bar(total=10, initial=4, desc="training", unit="step", file=file) as bar:
        for step in range(6):
            bar.set_postfix(loss=step)
            bar.update()
    (line,) = file.getvalue().splitlines()
    assert line.startswith("training: 10 of 10 steps, ") and line.endswith(", loss=5")


def test_a_bar_that_does_not_stay_leaves_nothing(clock: list[float]) -> None:
    file = io.StringIO()
    with Bar(total=2, leave=False, file=file) as bar:
        bar.update(2)
        Bar.write("between", file=file)
    list(Bar([1, 2], disable=True, file=file))
    assert file.getvalue() == "between\n"


def test_the_last_line_says_the_mean_pace_and_none_where_nothing_was_done(clock: list[float]) -> None:
    file = io.StringIO()
    for step in Bar(range(10), unit="video", file=file):
        clock[0] += 9.0 if step == 9 else 0.1
    with Bar(total=4, initial=4, unit="video", file=file):
        pass
    first, second = file.getvalue().splitlines()
    assert re.fullmatch(r"10 of 10 videos, 00:(09|10) gone, (1|1\.0\d) videos/s", first)
    assert second == "4 of 4 videos, 00:00 gone"


def test_a_bar_of_unknown_length() -> None:
    file = io.StringIO()
    list(Bar(iter("ab"), desc="looking", unit="batch", file=file))
    assert re.fullmatch(r"looking: 2 batches, 00:00 gone, \S+ batches/s\n", file.getvalue())


def test_a_terminal_gets_a_bar() -> None:
    terminal = Terminal()
    list(Bar(range(3), desc="captions", unit="video", file=terminal))
    assert "\r" in terminal.getvalue() and "100%" in terminal.getvalue()


def test_every_bar_of_ours_is_one_of_these() -> None:
    """Whoever draws with tqdm itself fills log files."""
    drawn = [
        path for path in (ROOT / "python").rglob("*.py") if re.search(r"\btqdm\(", path.read_text(encoding="utf-8"))
    ]
    assert drawn == []


def test_libraries_draw_no_bars_in_a_pipe(tmp_path: Path) -> None:
    code = (
        "from synpo import cli\n"
        "def show(args):\n"
        "    from transformers.utils import logging\n"
        "    list(logging.tqdm(range(3)))\n"
        "cli.COMMANDS['presets'] = show\n"
        "raise SystemExit(cli.main(['presets']))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_DISABLE_PROGRESS_BARS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "python"), *filter(None, sys.path)])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


def test_bars_in_a_pipe() -> None:
    code = "from synpo.progress import Bar\nfor _ in Bar(range(3), desc='x', unit='item'): pass"
    path = [str(ROOT / "python"), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path}\n{code}"], capture_output=True, text=True
    )
    assert done.stderr.startswith("x: 3 of 3 items") and done.stderr.count("\n") == 1
