"""What a demo came to: the table at the end, the two diagnostic plots, and report.html with every figure in report.json."""

from __future__ import annotations

import importlib.metadata
import io
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console

from synpo.demo.render import frames_of
from synpo.demo.world import Scene
from synpo.evaluate.run import EvalResult
from synpo.machine import cpu
from synpo.report.page import Highlight, Plot, Report, Sample, write_report
from synpo.report.table import Table, print_table
from synpo.train.diagnostics import ends, read_log
from synpo.train.plots import plot_gradient_balance, plot_rewards
from synpo.train.run import TrainResult

SAMPLES = 8
STRIP = 6  # frames shown of a sample


def _strip(scene: Scene) -> bytes:
    """Evenly spaced frames of a scene side by side, as a PNG."""
    frames = frames_of(scene)
    chosen = [frames[int((i + 0.5) * len(frames) / STRIP)] for i in range(STRIP)]
    side = chosen[0].shape[0]
    sheet = Image.new("RGB", (STRIP * (side + 2) - 2, side), "white")
    for i, frame in enumerate(chosen):
        sheet.paste(Image.fromarray(frame), (i * (side + 2), 0))
    data = io.BytesIO()
    sheet.save(data, "PNG", optimize=True)
    return data.getvalue()


def _habit_table(habits: Mapping[str, Mapping[str, float]]) -> Table:
    """Learnt errors by captioner, in per cent of the videos each could apply to."""
    kinds = list(next(iter(habits.values())))
    rows = [[system, *(f"{100 * shares[kind]:.0f}" for kind in kinds)] for system, shares in habits.items()]
    best = set()
    for column, kind in enumerate(kinds, 1):
        values = [shares[kind] for shares in habits.values()]
        best |= {(row, column) for row, value in enumerate(values) if value == min(values) < max(values)}
    note = (
        "per cent of the held-out videos where the error could be made; the captioner learnt them from noisy captions"
    )
    return Table("Learnt errors", ["system", *kinds], rows, good=best, notes=[note])


def _training_table(
    trained: Mapping[str, TrainResult], logs: Mapping[str, Sequence[Mapping[str, Any]]], rates: Mapping[str, float]
) -> Table:
    """How likely chosen and rejected captions were when training began and when it ended."""
    rows = []
    for name, run in trained.items():
        chosen, rejected = (ends(logs[name], f"synpo/{side}_logp") for side in ("chosen", "rejected"))
        rows.append(
            [
                name,
                f"{rates[name]:g}",
                str(run.metrics["pairs"]),
                str(run.metrics["steps"]),
                f"{chosen[0]:.2f} → {chosen[1]:.2f}",
                f"{rejected[0]:.2f} → {rejected[1]:.2f}",
                f"{run.metrics['seconds']:.0f}",
            ]
        )
    note = "mean log-likelihood of a token, first → last fifth of the steps; each at the learning rate that did best elsewhere"
    header = ["objective", "rate", "pairs", "steps", "log p, chosen", "log p, rejected", "seconds"]
    return Table("Training", header, rows, notes=[note])


def _machine() -> dict[str, str]:
    packages = ("synpo", "torch", "transformers", "peft", "av")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {
        "device": device,
        "CPU": f"{cpu()}; torch uses {torch.backends.cpu.get_cpu_capability()}",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages),
    }


def _verdict(result: EvalResult) -> str:
    """One sentence a system: what changed against the base captioner and whether the interval leaves out zero."""
    lines = []
    for system, found in result.differences.items():
        said = []
        for metric in ("fact F1", "CIDEr"):
            d = found[metric]
            if d is not None:
                sure = "" if d.low > 0 or d.high < 0 else ", not clear of zero"
                said.append(f"{metric} {100 * d.value:+.1f} ({100 * d.low:+.1f} to {100 * d.high:+.1f}{sure})")
        lines.append(f"{system} against base: {'; '.join(said)}.")
    return "\n".join(lines)


def show(
    output: Path,
    *,
    plan: Mapping[str, Any],
    scenes: Sequence[Scene],
    told: Mapping[str, Sequence[str]],
    result: EvalResult,
    captions: Mapping[str, Mapping[str, str]],
    habits: Mapping[str, Mapping[str, float]],
    trained: Mapping[str, TrainResult],
    pairs: Mapping[str, Any],
    seconds: Mapping[str, float],
    console: Console,
) -> Path:
    """Print the tables and write report.html, report.json and the plots into `output`; returns the path of the report."""
    rates = {name: settings["learning_rate"] for name, settings in plan["objectives"].items()}
    logs = {name: read_log(run.log) for name, run in trained.items()}
    plots = [
        Plot(
            "Log-likelihood of chosen and rejected captions",
            "Mean log-probability of a token over the training steps. A reward that is learnt by making the rejected caption "
            "unlikely pulls the chosen one down with it.",
            plot_rewards(logs, output / "rewards.png"),
        ),
        Plot(
            "Which side the gradient comes from",
            "Norm of the loss gradient through the chosen and through the rejected captions.",
            plot_gradient_balance(logs, output / "gradient_balance.png"),
        ),
    ]
    tables = [result.to_table(), _habit_table(habits), _training_table(trained, logs, rates)]
    if (difference := result.to_difference_table()) is not None:
        tables.insert(1, difference)
    by_video = {scene.video: scene for scene in scenes}
    samples = [
        Sample(
            video,
            told[video],
            {system: said[video] for system, said in captions.items()},
            _strip(by_video[video]),
        )
        for video in result.sample_videos(SAMPLES, "SynPO", "fact F1")
    ]
    f1 = {system: 100 * scores.corpus["fact F1"] for system, scores in result.scores.items()}
    report = Report(
        title="SynPO demo",
        lead=f"{len(by_video)} held-out videos, {pairs['pairs']} preference pairs built by the captioner itself.\n"
        + _verdict(result),
        highlights=[
            Highlight(f"fact F1, {system}", f"{value:.1f}", f"CIDEr {100 * result.scores[system].corpus['CIDEr']:.0f}")
            for system, value in f1.items()
        ],
        tables=tables,
        charts=result.to_charts(),
        plots=plots,
        samples=samples,
        seconds=seconds,
        run={**_machine(), "command": " ".join(["synpo", *sys.argv[1:]]), "seed": str(plan["seed"])},
        figures={
            "plan": plan,
            "machine": _machine(),
            "seconds": seconds,
            "scores": result.to_json(),
            "learnt errors": habits,
            "training": {name: run.metrics for name, run in trained.items()},
            "logs": logs,
            "pairs": pairs,
            "captions": captions,
        },
    )
    path = output / "report.html"
    write_report(path, report)
    for table in tables:
        print_table(table, console)
    console.print(_verdict(result), markup=False)
    console.print(f"{sum(seconds.values()):.0f} s in all; report: {path}", markup=False)
    return path
