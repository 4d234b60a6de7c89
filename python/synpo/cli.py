"""The `synpo` command: one subcommand a stage. Heavy packages load inside the subcommands, so --help is quick.

synpo demo     the whole system on a small video world, from rendering to report
synpo pairs    videos → clips → captions → scores → preference pairs
synpo plan     config and pairs → token counts, memory, largest micro-batch; no training
synpo train    preference pairs → LoRA adapter
synpo eval     held-out videos → captions → CIDEr and the rest; held-out pairs → likelihoods, answers
synpo presets  settings to start from
synpo config   every setting: its default, its type, what it does
synpo doctor   what this machine has, and which backends will be used
"""

from __future__ import annotations

import argparse
import difflib
import errno
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from synpo import __version__, onednn
from synpo.text import printable, tolerant


def _files(parser: argparse.ArgumentParser) -> None:
    """Flags that name settings."""
    parser.add_argument("--config", metavar="YAML", type=Path, help="configuration file; flags override it")
    parser.add_argument(
        "--preset", metavar="NAME", help="start from a preset, see `synpo presets`; --config goes over it"
    )
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="override one key, e.g. pairs.candidates=4"
    )


def _common(parser: argparse.ArgumentParser) -> None:
    """Flags of every command that loads a model. A flag that sets a key of the configuration has its name for a `dest`."""
    _files(parser)
    parser.add_argument(
        "--model", metavar="PATH_OR_ID", dest="model.path", help="checkpoint folder or hub id (model.path)"
    )
    parser.add_argument(
        "--adapter", metavar="DIR", dest="model.adapter", help="PEFT adapter to put on the model (model.adapter)"
    )
    parser.add_argument(
        "--device", dest="model.device", help="cpu, cuda, cuda:1 … (model.device; default: CUDA if there is one)"
    )
    parser.add_argument("--seed", type=int, help="seed of everything random (seed; default 0)")


def _training(parser: argparse.ArgumentParser) -> None:
    """The settings of training that are changed most."""
    parser.add_argument(
        "--loss", metavar="NAME", dest="train.loss_type", help="synpo, dpo, … (train.loss_type; default synpo)"
    )
    parser.add_argument(
        "--learning-rate", metavar="RATE", dest="train.learning_rate", help="(train.learning_rate; default 5e-06)"
    )
    parser.add_argument(
        "--epochs", metavar="N", dest="train.num_train_epochs", help="(train.num_train_epochs; default 5)"
    )
    parser.add_argument(
        "--batch-size",
        metavar="N",
        dest="train.per_device_train_batch_size",
        help="pairs a device takes at a time (train.per_device_train_batch_size; default 4); an optimizer step takes "
        "train.gradient_accumulation_steps (default 8) of them",
    )


def _batch(parser: argparse.ArgumentParser, section: str) -> None:
    parser.add_argument(
        "--batch-size",
        metavar="N",
        dest=f"{section}.batch_size",
        help=f"videos or captions worked on together ({section}.batch_size; default 8)",
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="synpo",
        description="Preference-tune video-language and text models with SynPO: pairs, training, evaluation.",
        epilog="Errors name the setting to change. SYNPO_DEBUG=1 adds the traceback.",
    )
    parser.add_argument("--version", action="version", version=f"synpo {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="run the whole system on a small rendered video world")
    demo.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        help="folder of everything the run makes (default demo-out; for another seed or scale demo-out-seed-1, say)",
    )
    demo.add_argument("--seed", type=int, default=0, help="seed of everything random (default 0)")
    demo.add_argument(
        "--scale", type=float, default=1.0, help="multiplies the numbers of videos and of steps (default 1)"
    )
    demo.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on from what the output folder holds (default), or start over",
    )

    pairs = commands.add_parser("pairs", help="build preference pairs from a folder of videos")
    _common(pairs)
    pairs.add_argument(
        "--videos",
        metavar="DIR",
        type=Path,
        required=True,
        help="folder of videos, with all below it; links are followed",
    )
    pairs.add_argument("--pairs", metavar="FILE", type=Path, required=True, help="JSON Lines file to write")
    pairs.add_argument("--work", metavar="DIR", type=Path, help="where stages keep their records (default FILE.work)")
    pairs.add_argument(
        "--engine",
        choices=["hf", "vllm"],
        dest="pairs.engine",
        help="what samples the candidates (pairs.engine; default hf)",
    )
    _batch(pairs, "pairs")

    plan = commands.add_parser("plan", help="count tokens and estimate memory of a training run, without training")
    _common(plan)
    _training(plan)
    plan.add_argument("--videos", metavar="DIR", type=Path, help="folder the pairs' video paths are relative to")
    plan.add_argument("--pairs", metavar="FILE", type=Path, required=True, help="JSON Lines file of pairs")
    plan.add_argument(
        "--gpu",
        metavar="SIZE",
        action="append",
        default=[],
        help="GPU memory to fit, e.g. 24GB (default: the GPU here)",
    )
    plan.add_argument("--all", action="store_true", help="read every pair, where a sample of many is read otherwise")
    plan.add_argument("--fit", action="store_true", help="also which GPU trains what: LoRA and QLoRA, 8 to 80 GB")
    plan.add_argument("--json", action="store_true", help="print one JSON document instead of tables")

    train = commands.add_parser("train", help="train a LoRA adapter on preference pairs")
    _common(train)
    _training(train)
    train.add_argument("--videos", metavar="DIR", type=Path, help="folder the pairs' video paths are relative to")
    train.add_argument("--pairs", metavar="FILE", type=Path, required=True, help="JSON Lines file of pairs")
    train.add_argument("--output", metavar="DIR", type=Path, required=True, help="folder of adapter, logs and plots")
    train.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on from the last checkpoint in the output folder (default), or start over",
    )

    evaluate = commands.add_parser(
        "eval", help="caption videos and score the captions, or score what is preferred in held-out pairs"
    )
    _common(evaluate)
    _batch(evaluate, "eval")
    evaluate.add_argument(
        "--videos",
        metavar="DIR",
        type=Path,
        help="folder of held-out videos, or of those of --pairs; links are followed",
    )
    evaluate.add_argument(
        "--pairs", metavar="FILE", type=Path, help="held-out pairs: likelihoods and greedy answers in place of captions"
    )
    evaluate.add_argument(
        "--references", metavar="FILE", type=Path, help="reference captions (VATEX, MSR-VTT, DREAM-1k or JSONL)"
    )
    evaluate.add_argument(
        "--output", metavar="DIR", type=Path, required=True, help="folder of captions or answers, and scores"
    )
    evaluate.add_argument(
        "--against",
        metavar="NAME=FILE",
        action="append",
        default=[],
        help="captions.jsonl (with --pairs answers.jsonl) of an earlier evaluation to compare with; the first is the baseline",
    )

    presets = commands.add_parser("presets", help="list the presets, or print one")
    presets.add_argument("name", nargs="?", metavar="NAME", help="print what this preset sets, as a file for --config")

    config = commands.add_parser("config", help="list every setting with its default, its type and what it does")
    _files(config)
    config.add_argument(
        "keys", nargs="*", metavar="KEY", help="only these, e.g. train.learning_rate, or judge for a section"
    )
    config.add_argument("--markdown", action="store_true", help="as a page")

    commands.add_parser("doctor", help="report versions, devices, extension and backends")
    return parser


def _config(args: argparse.Namespace) -> Any:
    """The run's Config: preset, then file, then --set, then flags."""
    from synpo.config import load_config

    flags: dict[str, Any] = {}
    for name, value in vars(args).items():
        section, _, key = name.partition(".")
        if key and value is not None:
            flags.setdefault(section, {})[key] = value
    if getattr(args, "seed", None) is not None:
        flags["seed"] = args.seed
    return load_config(args.config, args.set, flags, args.preset)


def _named_file(text: str) -> tuple[str, Path]:
    name, sign, path = text.partition("=")
    if not (name and sign and path):
        raise ValueError(f"--against takes NAME=FILE, got {text!r}")
    return name, Path(path)


def run_demo(args: argparse.Namespace) -> None:
    from synpo.demo.run import demo, folder_of

    demo(args.output or folder_of(args.seed, args.scale), seed=args.seed, scale=args.scale, resume=args.resume)


def run_pairs(args: argparse.Namespace) -> None:
    from synpo.pipeline.run import build_pairs

    build_pairs(_config(args), args.videos, args.pairs, args.work)


def run_plan(args: argparse.Namespace) -> None:
    from synpo.train.plan import plan, show

    show(plan(_config(args), args.videos, args.pairs, args.gpu, args.fit, args.all), as_json=args.json)


def run_train(args: argparse.Namespace) -> None:
    from synpo.train.run import train

    train(_config(args), args.videos, args.pairs, args.output, resume=args.resume)


def run_eval(args: argparse.Namespace) -> None:
    named = [_named_file(text) for text in args.against]
    against = dict(named)
    if len(against) < len(named):
        raise ValueError(f"--against takes each name once, got {', '.join(name for name, _ in named)}")
    if args.pairs is not None and args.references is not None:
        raise ValueError("--references are of captions of videos, --pairs brings its own answers: give one of the two")
    if args.pairs is not None:
        from synpo.evaluate.answers import evaluate_pairs

        evaluate_pairs(_config(args), args.pairs, args.videos, args.output, against)
    elif args.videos is not None:
        from synpo.evaluate.caption import evaluate_model

        evaluate_model(_config(args), args.videos, args.references, args.output, against)
    else:
        raise ValueError(
            "give --videos DIR (captions of videos) or --pairs FILE (likelihoods of held-out answers, for text too)"
        )


def run_presets(args: argparse.Namespace) -> None:
    from synpo.config import preset_names, preset_text

    if args.name is not None:
        print(preset_text(args.name), end="")
        return
    for name in preset_names():
        print(f"{name:18}{preset_text(name).splitlines()[0].lstrip('# ')}")


def run_config(args: argparse.Namespace) -> None:
    from synpo.keys import keys, lines, named, page, values

    if args.markdown:
        print(page(), end="")
        return
    given = args.config or args.preset or args.set
    for line in lines(named(keys(), args.keys), values(_config(args)) if given else {}):
        print(line)


def run_doctor(args: argparse.Namespace) -> None:
    from synpo.doctor import report

    report()


SET = ("pairs", "plan", "train", "eval")  # the commands that take --set for a run
COMMANDS = {
    "demo": run_demo,
    "pairs": run_pairs,
    "plan": run_plan,
    "train": run_train,
    "eval": run_eval,
    "presets": run_presets,
    "config": run_config,
    "doctor": run_doctor,
}


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments; a flag that there is not ends with the one, or the --set, to write in its place."""
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if not unknown:
        return args
    flag, sign, value = unknown[0].partition("=")
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    near = difflib.get_close_matches(flag, commands.choices[args.command]._option_string_actions, n=1, cutoff=0.75)
    if near:
        parser.exit(2, f"synpo {args.command}: there is no {flag}; did you mean {near[0]}?\n")
    if flag.startswith("--") and args.command in SET:
        from synpo.keys import advice

        if not sign and unknown[1:] and not unknown[1].startswith("--"):
            value = unknown[1]
        parser.exit(2, f"synpo {args.command}: {advice(flag, value or None, args.command)}\n")
    parser.error(f"unrecognized arguments: {' '.join(unknown)}")


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns 0, 2 with a one-line message for input that cannot be used, or 130 when interrupted."""
    tolerant(sys.stdout)
    tolerant(sys.stderr)
    args = _parse(argv)
    if not os.environ.get("SYNPO_DEBUG"):
        warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' too; ours are lines then
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # names a kernel for CPUs that it could fetch, at every start
    try:
        onednn.settle()
        COMMANDS[args.command](args)
    except (ValueError, OSError, FloatingPointError) as error:  # OSError: a file that is missing or barred, a full disk
        if os.environ.get("SYNPO_DEBUG"):
            raise
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        hint = ". Make room: what is finished is kept, the same command goes on from there" if full else ""
        said = str(error)
        if isinstance(error, OSError) and error.filename and error.strerror:
            said = f"{error.filename}: {error.strerror}"
        print(f"synpo {args.command}: {printable(said)}{hint}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        memory = (
            isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        )  # torch's, not imported here
        if os.environ.get("SYNPO_DEBUG") or not (memory or "can't allocate memory" in str(error)):
            raise
        said = (str(error).strip() or "Python's own").splitlines()[-1]
        print(
            f"synpo {args.command}: out of memory: {printable(said)}. Take a smaller --batch-size, "
            "frames.maximum, lora.r or model.dtype; `synpo plan` says what training needs",
            file=sys.stderr,
        )
        return 2
    except ModuleNotFoundError as error:
        package = (error.name or "synpo").partition(".")[0]
        if os.environ.get("SYNPO_DEBUG") or package in ("synpo", "synpo_kernels"):
            raise
        print(
            f"synpo {args.command}: needs the package {package}, which is not installed; "
            "pip install 'synpo[all]' (from a checkout: pip install '.[all]') has all but the optional ones",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"synpo {args.command}: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0
