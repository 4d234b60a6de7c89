"""The command line: quick help, one-line errors, and flags that reach the configuration."""

import argparse
import errno
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from synpo.cli import COMMANDS as COMMANDS_OF_CLI
from synpo.cli import _config, build_parser, main
from synpo.config import load_config, preset_names
from synpo.keys import keys
from synpo.train.run import settings

COMMANDS = ("demo", "pairs", "plan", "train", "eval", "presets", "config", "doctor")


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


def float_or_text(text):
    try:
        return float(text)
    except ValueError:
        return text


@pytest.mark.parametrize("command", COMMANDS)
def test_what_help_says_is_true(command):
    """A default it states is the default, a key it names is a key."""
    options = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices[command]
    known = {key.name: yaml.safe_load(key.default) for key in keys()}
    for action in options._actions:
        if "." in action.dest:
            assert f"({action.dest}; default" in action.help or f"({action.dest})" in action.help, action.dest
        if action.default is None:
            stated = re.findall(r"\(([a-z_.]+); default ([\w.-]+)", action.help or "")
            for key, value in stated:
                assert action.dest in (key, "seed") and float_or_text(value) == known[key], (key, value)
        else:
            for value in re.findall(r"default ([\w.]+)\b(?!\.)", action.help or ""):
                assert float_or_text(value) == float_or_text(str(action.default)), (action.dest, value)
        for key in re.findall(r"\b(?:model|pairs|eval|train|judge|frames)\.\w+", (action.help or "")):
            assert key in known, (action.dest, key)
        if isinstance(action, argparse.BooleanOptionalAction):
            assert action.default is True and "(default)" in (action.help or "")


def test_the_records_lie_beside_the_pairs_unless_told(tiny_captioner_path, tmp_path, capsys):
    """--work: default FILE.work."""
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "a.mp4").write_bytes(b"noise")
    model, videos, pairs = str(tiny_captioner_path), str(tmp_path / "v"), str(tmp_path / "p")
    assert main(["pairs", "--model", model, "--videos", videos, "--pairs", pairs]) == 2
    assert "none of the 1 videos can be used" in capsys.readouterr().err
    assert (tmp_path / "p.work" / "problems.jsonl").exists()


@pytest.mark.parametrize("command", ["train", "plan"])
def test_what_is_changed_most_has_a_flag(command):
    arguments = [command, "--pairs", "p.jsonl", *(["--output", "o"] if command == "train" else [])]
    flags = ["--loss", "dpo", "--learning-rate", "1e-5", "--epochs", "2", "--batch-size", "3"]
    config = _config(build_parser().parse_args([*arguments, *flags, "--preset", "llama3-lora"]))
    args = settings(replace(config, model=replace(config.model, device="cpu")), Path("o"))
    assert (args.loss_type, args.learning_rate, args.num_train_epochs) == ("dpo", 1e-5, 2.0)
    assert (args.per_device_train_batch_size, args.alpha, args.beta) == (3, None, None)


def test_batches_of_the_other_commands():
    pairs = build_parser().parse_args(["pairs", "--videos", "v", "--pairs", "p", "--batch-size", "3"])
    assert _config(pairs).pairs.batch_size == 3
    evaluate = build_parser().parse_args(["eval", "--videos", "v", "--output", "o", "--batch-size", "5"])
    assert _config(evaluate).eval.batch_size == 5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lr", "1e-4"], "--lr: write --set train.learning_rate=1e-4 ("),
        (["--lr=1e-4"], "write --set train.learning_rate=1e-4 ("),
        (["--lora-rank", "8"], "write --set lora.r=8 ("),
        (["--dropout", "0.1"], "write --set lora.dropout=0.1 ("),
        (["--max-length", "--no-resume"], "write --set train.max_length=INT_OR_NULL ("),
        (["--weight-decay", "0.1"], "write --set train.weight_decay=0.1 ("),
        (["--lerning-rate", "1"], "did you mean --learning-rate?"),
        (["--wieght-decay", "1"], "write --set train.weight_decay=1 ("),
        (["--candidates", "4"], "there is no --candidates; `synpo train --help`"),
        (["--zzz"], "there is no --zzz; `synpo train --help`"),
    ],
)
def test_a_flag_that_there_is_not_is_answered_with_what_to_write(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--pairs", "p", "--output", "o", *arguments])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "key"),
    [
        (["pairs", "--videos", "v", "--pairs", "p"], "pairs.candidate_sampling.temperature"),
        (["eval", "--videos", "v", "--output", "o"], "eval.sampling.temperature"),
    ],
)
def test_the_nearest_section_is_meant(command, key, capsys):
    with pytest.raises(SystemExit):
        main([*command, "--temperature", "0.5"])
    assert f"write --set {key}=0.5" in capsys.readouterr().err


def test_other_commands_know_no_settings(capsys):
    for command in ("demo", "doctor", "config"):
        with pytest.raises(SystemExit):
            main([command, "--lr", "1"])
        assert "unrecognized arguments: --lr" in capsys.readouterr().err


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


@pytest.mark.parametrize("name", preset_names())
def test_a_printed_preset_is_that_preset(name, tmp_path, capsys):
    assert main(["presets", name]) == 0
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out)
    assert load_config(tmp_path / "c.yaml") == load_config(preset=name)


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


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        ([], "demo-out"),
        (["--seed", "1"], "demo-out-seed-1"),
        (["--scale", "0.5"], "demo-out-scale-0.5"),
        (["--seed", "2", "--scale", "0.1"], "demo-out-seed-2-scale-0.1"),
        (["--seed", "1", "--output", "here"], "here"),
    ],
)
def test_a_demo_of_another_seed_goes_beside_the_first(arguments, folder, monkeypatch):
    seen = []
    monkeypatch.setattr("synpo.demo.run.demo", lambda output, **plan: seen.append(output))
    assert main(["demo", *arguments]) == 0
    assert seen == [Path(folder)]


class OutOfMemoryError(RuntimeError):
    """As torch's, which the command line does not import."""


@pytest.mark.parametrize(
    "error",
    [
        OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 2560 bytes."),
        MemoryError(),
    ],
)
def test_no_memory_is_a_line_that_says_what_to_change(error, monkeypatch, capsys):
    def fails(args):
        raise error

    monkeypatch.setitem(COMMANDS_OF_CLI, "presets", fails)
    assert main(["presets"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("synpo presets: out of memory: ") and said.count("\n") == 1 and "--batch-size" in said


def test_another_error_of_the_runtime_keeps_its_traceback(monkeypatch):
    def fails(args):
        raise RuntimeError("a bug")

    monkeypatch.setitem(COMMANDS_OF_CLI, "presets", fails)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["presets"])


@pytest.mark.parametrize("command", ["config", "pairs", "plan", "train", "eval"])
@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.lr=3", "train: unknown key 'lr'; did you mean 'train.learning_rate'?"),
        ("lr=3", "config: unknown key 'lr'; did you mean 'train.learning_rate'?"),
        ("train.zzzz=3", "train: unknown key 'zzzz'; `synpo config` lists all"),
        ("train.alpha=-3", "train: synpo: alpha must be positive, got -3.0"),
        ("train.max_steps=0", "train.max_steps: expected at least 1, or -1 (then num_train_epochs counts), got 0"),
        ("train.num_train_epochs=0", "train.num_train_epochs: expected above 0, got 0.0"),
        ("eval.prompt=' '", "config.eval: prompt: expected some words, got ' '"),
        ("seed=[1", "--set seed: '[1' is not YAML: expected ',' or ']', but got '<stream end>' in line 1, column 3"),
    ],
)
def test_a_wrong_setting_is_one_line_whatever_the_command(command, setting, said, tmp_path, capsys):
    """Of a section that the command does not read, too: it stands in the file that the next one is given."""
    flags = {
        "config": [],
        "pairs": ["--videos", "v", "--pairs", "p.jsonl"],
        "plan": ["--pairs", "p.jsonl"],
        "train": ["--pairs", "p.jsonl", "--output", str(tmp_path / "out")],
        "eval": ["--pairs", "p.jsonl", "--output", str(tmp_path / "out")],
    }[command]
    assert main([command, "--set", setting, *flags]) == 2
    assert capsys.readouterr().err == f"synpo {command}: {said}\n"
    assert not any(tmp_path.iterdir())


def test_a_model_that_is_nowhere_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    assert main(["train", "--model", "no-such_model/", "--pairs", "p.jsonl", "--output", "a/b/out"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "there is no such folder, and from the hub: " in said
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("demo --sclae 3", "--scale"),
        ("train --pairs p --output o --modle x", "--model"),
        ("train --pairs p --output o --learning_rate=1", "--learning-rate"),
        ("eval --output o --refrences x", "--references"),
        ("config --markdwn", "--markdown"),
    ],
)
def test_a_misspelt_flag_is_answered_with_the_right_one(line, meant, capsys):
    command, flag = line.split()[0], line.split(" --")[-1].replace("=", " ").split()[0]
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"synpo {command}: there is no --{flag}; did you mean {meant}?\n"


def test_a_warning_is_a_line() -> None:
    code = (
        "import sys, warnings\nfrom synpo import cli\n"
        "cli.COMMANDS['presets'] = lambda args: warnings.warn('tokens are not kept')\nsys.exit(cli.main(['presets']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (done.returncode, done.stderr) == (0, "warning: tokens are not kept\n")
