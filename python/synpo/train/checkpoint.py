"""Checkpoints that can be trusted: which one a run goes on from, and what is said when one cannot be written.

A checkpoint is whole when its state file, which is written last, is there and every weight and optimizer file is as long as
it says it is. Anything else (a process killed while writing or while removing an old one, a disk that filled up, a copy
that was cut) is passed over with its reason, and the one before it is used. A run that goes on renames it to
broken-checkpoint-<step>, so that it does not count among those to keep.
"""

from __future__ import annotations

import json
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from synpo.records import read_jsonl

STATE = "trainer_state.json"
OPTIMIZER = ("optimizer*", "global_step*", "pytorch_model_fsdp*")  # one process; DeepSpeed; FSDP

TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "iostream")  # in what torch.save says of a full disk


class CheckpointError(ValueError):
    """A checkpoint or adapter could not be written. The message says what is left and what to do."""


def fault(folder: Path) -> str | None:
    """Why a run cannot go on from a checkpoint folder; None when it can."""
    try:
        step = json.loads((folder / STATE).read_text(encoding="utf-8"))["global_step"]
    except FileNotFoundError:
        return "it was not written to its end"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{STATE} cannot be read ({error})"
    if folder.name != f"checkpoint-{step}":
        return f"{STATE} is that of step {step}"
    if not any(True for pattern in OPTIMIZER for _ in folder.glob(pattern)):
        return "it holds no optimizer state"
    weights = [*folder.glob("*.safetensors"), *folder.glob("global_step*"), *folder.glob("pytorch_model_fsdp*")]
    if not weights:
        return "it holds no weights"
    for file in sorted(folder.iterdir()):
        if file.suffix == ".safetensors" and not _whole_safetensors(file):
            return f"{file.name} is truncated or not readable"
        if file.suffix in (".pt", ".pth", ".bin") and not _whole_archive(file):
            return f"{file.name} is truncated or not readable"
        if file.is_dir() and any(file.glob("*.distcp")) and not (file / ".metadata").exists():
            return f"{file.name} was not written to its end"
    return None


def _whole_safetensors(file: Path) -> bool:
    try:
        with open(file, "rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0]
            header = json.loads(stream.read(length))
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        return file.stat().st_size == 8 + length + end
    except (OSError, ValueError, KeyError, struct.error, MemoryError, OverflowError):
        return False


def _whole_archive(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile, EOFError):
        return False


def owes_evaluation(checkpoint: Path, log: Path, args: TrainingArguments) -> bool:
    """Whether the run was killed after this checkpoint and before the evaluation that was due at the same step.

    Evaluations once an epoch (and once where the steps end within one) come after what is saved at its last step.
    """
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    step, epoch = state["global_step"], state["epoch"]
    due = epoch == int(epoch) or step >= state["max_steps"]
    if args.eval_strategy != IntervalStrategy.EPOCH or not due or epoch < args.eval_delay:
        return False
    return not (log.exists() and any(row["step"] == step and "eval_loss" in row for _, row in read_jsonl(log)))


def _newest_first(output: Path) -> list[Path]:
    folders = [f for f in output.glob("checkpoint-*") if f.name.removeprefix("checkpoint-").isdigit()]
    return sorted(folders, key=lambda f: int(f.name.removeprefix("checkpoint-")), reverse=True)


def holds_work(output: Path) -> bool:
    """Whether a run has left something there that another one would undo: a checkpoint, or its end."""
    return bool(_newest_first(output)) or (output / "metrics.json").exists()


def last_checkpoint(output: Path) -> Path | None:
    """The newest whole checkpoint of a run, None when there is none."""
    return next((folder for folder in _newest_first(output) if fault(folder) is None), None)


def set_broken_aside(output: Path, say: Callable[[str], None]) -> None:
    """Rename the checkpoints that are newer than the last whole one and not whole; `say` hears of each and why."""
    for folder in _newest_first(output):
        reason = fault(folder)
        if reason is None:
            return
        say(f"{folder} is passed over: {reason}")
        aside = folder.with_name(f"broken-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn a failed write of the folder `target` into CheckpointError, removing what was written of it.

    Other errors pass; so does a folder that was whole before.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in TORCH_WRITER):
            raise  # no matter of files
        shutil.rmtree(target, ignore_errors=True)
        last = last_checkpoint(target.parent)
        kept = f"The last good one is {last}" if last else "There is no earlier one"
        raise CheckpointError(
            f"{target} could not be written: {str(error).splitlines()[0]}. {kept}. Free space on that disk (or lower "
            "train.save_total_limit), then the same command goes on from it"
        ) from error
