"""The command line: quick help, one-line errors, and flags that reach the configuration."""

import argparse
import errno
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from synpo.cli import COMMANDS as COMMANDS_OF_CLI
from synpo.cli import _config, build_parser, main
from synpo.config import Config

COMMANDS = ("demo", "pairs", "plan", "train", "eval", "presets", "doctor")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert command in capsys.readouterr().out


def test_help_loads_nothing_heavy():
    code = (
        "import sys\n"
        "from synpo.cli import COMMANDS, main\n"
        "for command in ([], *([c] for c in COMMANDS)):\n"
        "    try: main([*command, '--help'])\n"
        "    except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'rich', 'av', 'matplotlib', 'yaml', 'openai'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    paths = [str(Path(__file__).resolve().parent.parent / p) for p in ("", "python")]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths}\n{code}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["demo", "pairs", "plan", "train", "eval", "presets", "doctor"])
def test_what_help_says_is_true(command):
    """A default it states is the default, a key it names is a key."""
    options = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices[command]
    flags = {"seed": Config().seed, "engine": Config().pairs.engine}
    for action in options._actions:
        for stated in re.findall(r"default ([\w.]+)\b(?!\.)", action.help or ""):
            if stated != "FILE.work":  # below
                value = flags[action.dest] if action.default is None else action.default
                assert stated == f"{value:g}" if isinstance(value, float) else stated == str(value), (
                    action.dest,
                    stated,
                )
        for section, key in re.findall(r"\b(model|pairs|eval|train|judge|frames)\.(\w+)", action.help or ""):
            assert key in {f.name for f in fields(getattr(Config(), section))}, (action.dest, section, key)
        if isinstance(action, argparse.BooleanOptionalAction):
            assert action.default is True and "(default)" in (action.help or "")


def test_the_records_lie_beside_the_pairs_unless_told(tmp_path, capsys):
    """--work: default FILE.work."""
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "a.mp4").write_bytes(b"noise")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    assert (
        main(["pairs", "--model", str(tmp_path / "m"), "--videos", str(tmp_path / "v"), "--pairs", str(tmp_path / "p")])
        == 2
    )
    assert "none of the 1 videos can be used" in capsys.readouterr().err
    assert (tmp_path / "p.work" / "problems.jsonl").exists()


def test_flags_lie_over_set_and_set_over_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("seed: 1\nmodel: {path: from-file, dtype: float16}\npairs: {candidates: 3, margin: 1}\n")
    args = build_parser().parse_args(
        ["pairs", "--config", str(file), "--set", "pairs.candidates=5", "--set", "model.path=from-set"]
        + ["--model", "from-flag", "--videos", "v", "--pairs", "p.jsonl"]
    )
    config = _config(args)
    assert (config.model.path, config.model.dtype, config.seed) == ("from-flag", "float16", 1)
    assert (config.pairs.candidates, config.pairs.margin) == (5, 1.0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "pairs.candidats=5"], "did you mean 'candidates'"),
        (["--set", "judge"], "section.key=value"),
        (["--config", "missing.yaml"], "missing.yaml does not exist"),
        (["--model", "./no-such-folder"], "./no-such-folder does not exist"),
        ([], "give --model"),
    ],
)
def test_unusable_input_is_one_line_and_exit_code_2(arguments, said, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("SYNPO_DEBUG", raising=False)
    (tmp_path / "a.mp4").write_bytes(b"not a video")
    code = main(["pairs", *arguments, "--videos", str(tmp_path), "--pairs", str(tmp_path / "pairs.jsonl")])
    error = capsys.readouterr().err
    assert code == 2
    assert said in error
    assert "Traceback" not in error
    assert not (tmp_path / "pairs.jsonl").exists()


def test_a_folder_without_videos_is_said(tmp_path, capsys):
    code = main(["eval", "--model", "x", "--videos", str(tmp_path), "--output", str(tmp_path / "out")])
    assert code == 2
    assert "no video below" in capsys.readouterr().err


def test_against_wants_a_name_and_a_file(tmp_path, capsys):
    code = main(["eval", "--videos", str(tmp_path), "--output", str(tmp_path / "out"), "--against", "captions.jsonl"])
    assert code == 2
    assert "NAME=FILE" in capsys.readouterr().err


def test_against_takes_a_name_once(tmp_path, capsys):
    arguments = ["eval", "--videos", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--against", "a=x.jsonl", "--against", "a=y.jsonl"]) == 2
    assert "each name once, got a, a" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the same command goes on"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "pairs.jsonl"),
            "presets: pairs.jsonl: No such file",
        ),
        (FloatingPointError("NaN logits; try model.dtype float32"), "try model.dtype float32"),
        (ModuleNotFoundError("No module named 'openai'", name="openai"), "needs the package openai"),
    ],
)
def test_errors_of_the_machine_are_one_line_too(error, said, monkeypatch, capsys):
    def failing(args):
        raise error

    monkeypatch.setitem(COMMANDS_OF_CLI, "presets", failing)
    assert main(["presets"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_terminal_that_is_not_utf8_is_no_error():
    code = (
        "from synpo import cli\n"
        "cli.COMMANDS['presets'] = lambda args: print('×100 größer κ 犬')\n"
        "raise SystemExit(cli.main(['presets']))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "?100 gr??er ? ?\n")


def test_a_missing_module_of_our_own_is_a_bug_and_shown_as_one(monkeypatch):
    def failing(args):
        raise ModuleNotFoundError("No module named 'synpo.nothing'", name="synpo.nothing")

    monkeypatch.setitem(COMMANDS_OF_CLI, "presets", failing)
    with pytest.raises(ModuleNotFoundError):
        main(["presets"])


def test_presets_are_listed_and_printed(capsys):
    assert main(["presets"]) == 0
    listed = capsys.readouterr().out
    for name in ("auroracap-lora", "qwen2.5-vl-lora", "llama3-lora", "smoke"):
        assert f"{name} " in listed
    assert main(["presets", "auroracap-lora"]) == 0
    values = yaml.safe_load(capsys.readouterr().out)
    assert values["lora"]["r"] == 128
    assert values["train"]["learning_rate"] == 5e-6
    assert main(["presets", "smok"]) == 2
    assert "did you mean 'smoke'" in capsys.readouterr().err


def test_file_set_and_flags_lie_over_a_preset(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("lora: {r: 2}\ntrain: {beta: 0.3}\n")
    args = build_parser().parse_args(
        [
            "plan",
            "--preset",
            "smoke",
            "--config",
            str(file),
            "--set",
            "train.max_steps=7",
            "--model",
            "m",
            "--pairs",
            "p",
        ]
    )
    config = _config(args)
    assert (config.lora.r, config.lora.alpha, config.model.device, config.model.path) == (2, 8, "cpu", "m")
    assert config.train["beta"] == 0.3
    assert (config.train["max_steps"], config.train["num_train_epochs"]) == (7, 1)
