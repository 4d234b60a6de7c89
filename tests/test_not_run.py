"""The end of a test run says what did not run, by reason."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import not_run

ROOT = Path(__file__).resolve().parent.parent


def test_reasons_are_counted() -> None:
    reports = [SimpleNamespace(longrepr=("a.py", 3, f"Skipped: {why}")) for why in ("no java", "no GPU", "no GPU")]
    assert not_run.lines([*reports, SimpleNamespace(longrepr="xfail")]) == [
        "    2  no GPU",
        "    1  no java",
        "    1  xfail",
    ]


def test_they_stand_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_a.py").write_text(
        "import pytest\n@pytest.mark.parametrize('i', range(3))\ndef test(i): pytest.skip('needs a GPU')\ndef test_b(): pass\n"
    )
    path = os.pathsep.join([str(ROOT / "python"), str(ROOT / "tests" / "support"), *filter(None, sys.path)])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 tests or modules did not run" in done.stdout and "\n    3  needs a GPU\n" in done.stdout
