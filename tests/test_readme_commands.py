"""Every command that the README, or a page it leads to, prints is carried out, in its order, with its placeholders filled in.

Models named by hub id are a tiny captioner, videos a few seconds, and what is slow with both is cut short by the preset `smoke`.
Commands stand in blocks marked `bash`, in indented lines, and between backticks in the text.
"""

import json
import re
import shlex
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from made_videos import write_video
from synpo import cli
from synpo.records import Pair, write_records

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "python/synpo/README.md", "python/synpo/demo/README.md", "bench/FIGURES.md")
TEXT = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
PROGRAMS = ("synpo", ".venv/bin/synpo", "make", "pip", "python", "torchrun", "bench/gpu.sh")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+-(ov|hf|VL|Instruct)[\w.-]*")
SHORT = {
    "pairs": ["--preset", "smoke"],
    "train": ["--preset", "smoke"],
    "plan": ["--preset", "smoke"],
    "eval": ["--preset", "smoke"],
}


def commands() -> list[list[str]]:
    """The arguments of each, programs first."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^```.*?^```", "", TEXT, flags=re.DOTALL | re.MULTILINE)
    lines = [
        line for language, block in blocks if language == "bash" for line in block.replace("\\\n", " ").splitlines()
    ]
    lines += re.findall(r"^ {4}(\S.*)$", prose, re.MULTILINE)
    return [*_words(lines), *in_prose()]


def in_prose() -> list[list[str]]:
    """Those between backticks, some of them only named."""
    return _words(re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", TEXT, flags=re.DOTALL | re.MULTILINE)))


def _words(lines: list[str]) -> list[list[str]]:
    words = [shlex.split(line, comments=True) for line in lines if line.split(" ")[0] in PROGRAMS and "'" not in line]
    return [line for line in words if len(line) > 1]


def filled(line: list[str], model: Path) -> list[str]:
    """With a model for every hub id and every …, and without the … that stands for what else there may be."""
    if line[-1] == "…" and line[-2] != "--model":
        line = line[:-1]
    return [str(model) if word == "…" or HUB_ID.fullmatch(word) else word for word in line]


@pytest.fixture
def folder(tiny_captioner_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the commands find around them."""
    for name in ("videos", "held-out"):
        (tmp_path / name).mkdir()
        for k in range(2):
            write_video(tmp_path / name / f"{k}.mp4", shade=60 * k)
    rows = [{"video": f"{k}.mp4", "captions": ["A white bar falls.", "A bar."]} for k in range(2)]
    (tmp_path / "references.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "demo-out").mkdir()
    (tmp_path / "demo-out" / "captioner").symlink_to(tiny_captioner_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands_of_ours_do_what_they_say(folder: Path, tiny_captioner_path: Path) -> None:
    done = 0
    for program, command, *arguments in (filled(line, tiny_captioner_path) for line in commands()):
        if not program.endswith("synpo") or command == "demo":
            continue
        if command == "presets":
            arguments = [cli_preset() if word == "NAME" else word for word in arguments]
        if lacking := required(command) - set(arguments):  # only named, between backticks: its flags are there
            assert [program, command, *arguments] in in_prose(), f"{command} {arguments} lacks {lacking}"
            cli.build_parser().parse_args([command, *arguments, *(word for flag in lacking for word in (flag, "x"))])
            continue
        assert cli.main([command, *SHORT.get(command, []), *arguments]) == 0, (command, arguments)
        done += 1
        if (
            command == "pairs" and not (folder / "pairs.jsonl").read_text()
        ):  # a tiny captioner's candidates are all alike
            pairs = [Pair(f"p{k}", f"{k}.mp4", "Describe.", f"A bar {k}.", "It rains.") for k in range(2)]
            write_records(folder / "pairs.jsonl", pairs)
    assert done >= 8


def cli_preset() -> str:
    from synpo.config import preset_names

    return preset_names()[0]


def required(command: str) -> set[str]:
    (commands,) = (action for action in cli.build_parser()._actions if action.dest == "command")
    parser = commands.choices[command]  # type: ignore[index]
    return {action.option_strings[0] for action in parser._actions if action.required and action.option_strings}


def test_targets_of_make_are_there_and_take_their_arguments(tmp_path: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    (tmp_path / ".venv").mkdir()
    seen = 0
    for program, *arguments in commands():
        if program != "make":
            continue
        done = subprocess.run(["make", "-n", *arguments, "READY="], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, (arguments, done.stderr)
        seen += 1
        for line in done.stdout.splitlines():
            if "/synpo demo" in line:
                cli.build_parser().parse_args(shlex.split(line)[1:])
    assert seen >= 2
    for arguments in re.findall(r'DEMO_ARGS="([^"]*)"', TEXT):
        assert cli.build_parser().parse_args(["demo", *shlex.split(arguments)]).command == "demo"


def test_what_pip_is_given_is_there() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")[2]
    extras = set(re.findall(r"^(\w+) = \[", text.partition("\n[")[0], re.MULTILINE))
    installs = [" ".join(arguments) for program, *arguments in commands() if program == "pip"]
    named = re.findall(r"\[([\w,]+)\]", " ".join(installs)) + re.findall(r"'synpo\[([\w,]+)\]'", TEXT)
    assert installs and {extra for group in named for extra in group.split(",")} <= extras


def test_modules_and_scripts_are_there() -> None:
    for program, *arguments in commands():
        if program in ("python", "torchrun") and "-m" in arguments:
            module = arguments[arguments.index("-m") + 1]
            assert find_spec(module) is not None, module
        if program.startswith("bench/"):
            assert (ROOT / program).is_file()
