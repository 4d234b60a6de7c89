"""What a demo came to: the tables at the end, the two diagnostic plots, and report.html with every figure in report.json."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from synpo.demo import judged
from synpo.demo.world import Scene
from synpo.evaluate import show as evaluation
from synpo.evaluate.run import EvalResult
from synpo.machine import described
from synpo.records import Pair, read_records, write_json
from synpo.report.frames import strip
from synpo.report.page import Report, plain, write_report
from synpo.report.table import Table, print_table
from synpo.train.diagnostics import ends, read_log
from synpo.train.plots import PICTURES, Rows, curves, plot
from synpo.train.run import TrainResult
from synpo.train.show import OBJECTIVES, PAIR

WORLD = (
    "the world",
    "One to three coloured shapes that move, bounce, stay, change colour, come, leave or pass in front of one another, "
    "rendered to videos by this program; so what is true of each is known exactly.",
)
BASE = (
    "base",
    "The captioner before preference training. It was taught on captions that are wrong in five ways, each a known share of the "
    "time, as captions from the web are: it sees more than it says.",
)
ERRORS = {
    "invented event": "something large that moves across is said to leave",
    "invented object": "where there is a circle, a small white star is said to stand beside it",
    "missed change": "that a shape changes its colour is not said",
    "wrong colour": "purple is called blue, orange red",
    "wrong direction": "what moves left is said to move right, what moves up to move down",
}
ONE_RUN = (
    "This is one seed on one processor. The captioner is taught in 4,000 steps; how each is rounded differs between processors "
    "and with the number of threads, and that adds up: elsewhere the same seed renders the same videos but schools another "
    "captioner, as another seed does. In seven runs (seeds 0 to 3 on one processor, seed 0 there with one thread, and on "
    "another with all its instructions and with MKL held to AVX2) SynPO raised fact F1 by 5.7 to 11.7 points over the base of "
    "the same run."
)


def _error_table(shares: Mapping[str, Mapping[str, float]], systems: Sequence[str]) -> Table:
    """Learnt errors by captioner and in the pairs, in per cent of the videos each could apply to."""
    kinds = sorted({kind for found in shares.values() for kind in found})
    rows = [
        [name, *(f"{100 * found[kind]:.0f}" if kind in found else "–" for kind in kinds)]
        for name, found in shares.items()
    ]
    best = set()
    for column, kind in enumerate(kinds, 1):
        values = [shares[system].get(kind, 0.0) for system in systems]
        best |= {(row, column) for row, value in enumerate(values) if value == min(values) < max(values)}
    notes = [
        "per cent of the videos where the error could be made; the last two rows are the captions of the pairs: an error that "
        "is no rarer in the chosen than in the rejected ones cannot be unlearnt from them",
        *(f"{kind}: {meaning}" for kind, meaning in ERRORS.items() if kind in kinds),
    ]
    return Table("Learnt errors", ["", *kinds], rows, best=best, notes=notes)


def _training_table(trained: Mapping[str, TrainResult], logs: Mapping[str, Rows], rates: Mapping[str, float]) -> Table:
    """How likely chosen and rejected captions were when training began and when it ended."""
    rows = []
    for name, run in trained.items():
        chosen, rejected = (ends(logs[name], f"synpo/{side}_logp") for side in ("chosen", "rejected"))
        rows.append(
            [
                name,
                f"{chosen[0]:.2f} → {chosen[1]:.2f}",
                f"{rejected[0]:.2f} → {rejected[1]:.2f}",
                f"{rates[name]:g}",
                str(run.metrics["pairs"]),
                str(run.metrics["steps"]),
                f"{run.metrics['seconds']:.0f}",
            ]
        )
    note = "mean log-likelihood of a token, first → last fifth of the steps; each at the learning rate that did best elsewhere"
    header = ["objective", "log p, chosen", "log p, rejected", "rate", "pairs", "steps", "seconds"]
    return Table("Training", header, rows, notes=[note])


def show(
    output: Path,
    *,
    plan: Mapping[str, Any],
    scenes: Mapping[str, Sequence[Scene]],
    told: Mapping[str, Sequence[str]],
    result: EvalResult,
    captions: Mapping[str, Mapping[str, str]],
    trained: Mapping[str, TrainResult],
    summary: Mapping[str, Any],
    seconds: Mapping[str, float],
    console: Console,
) -> Path:
    """Print the tables and write report.html, report.json and the plots into `output`; returns the path of the report.

    Args:
        plan, summary: of the demo and of its pairs, as JSON values. scenes: split → scenes. told: held-out video → references.
        captions: system → held-out video → caption, scored in `result`. trained: objective → its run. seconds: stage → wall time.
    """
    videos, pairs = output / "videos", read_records(Pair, output / "pairs.jsonl")
    logs: dict[str, Rows] = {name: read_log(run.log) for name, run in trained.items()}
    for picture in PICTURES:
        plot(picture, logs, output)
    habits = judged.habits(captions, scenes["held-out"])
    taught = {f"{side} captions": said for side, said in judged.sides(pairs).items()}
    in_pairs = judged.habits(taught, scenes["pairs"])
    rates = {name: settings["learning_rate"] for name, settings in plan["objectives"].items()}
    tables = [*result.to_tables(), _error_table(habits | in_pairs, result.systems)]
    training = [_training_table(trained, logs, rates)]
    findings = evaluation.findings(result)
    machine = described()
    figures = {
        "plan": plan,
        "machine": machine,
        "seconds": seconds,
        "scores": result.to_json(),
        "learnt errors": habits,
        "learnt errors in the pairs": in_pairs,
        "training": {name: run.metrics for name, run in trained.items()},
        "logs": logs,
        "pairs": {"pairs": len(pairs), "summary": summary},
        "captions": captions,
    }
    objectives = [(name, OBJECTIVES[plan["objectives"][name]["loss_type"]]) for name in trained]
    report = Report(
        title="SynPO demo",
        lead=f"A small captioner described {len(scenes['pairs'])} videos several times each, a judge that has no facts ranked "
        f"what it said, and {len(pairs)} pairs of a better and a worse caption came of it. {', '.join(trained)} were trained on "
        f"these pairs from the same start. Here all describe {len(result.videos)} further videos.",
        findings=findings,
        highlights=evaluation.highlights(result),
        terms=[WORLD, BASE, PAIR, *objectives, *evaluation.words(result)],
        systems=result.systems,
        notes=[ONE_RUN] if plan["scale"] == 1 else [],
        charts=result.to_charts(),
        tables=tables,
        captions=evaluation.groups(result, captions, told, partial(strip, videos / "held-out")),
        curves=[curves(picture, logs) for picture in PICTURES],
        training=training,
        pairs=judged.groups(pairs, scenes["pairs"], videos / "pairs"),
        seconds=seconds,
        run={**machine, "command": " ".join(["synpo", *sys.argv[1:]]), "seed": str(plan["seed"])},
        figures=figures,
        beside="report.json",
    )
    path = output / "report.html"
    write_report(path, report)
    write_json(output / "report.json", plain(figures))
    for table in [*tables, *training]:
        print_table(table, console)
    for sentence in findings:
        console.print(sentence)
    console.print(f"{sum(seconds.values()):.0f} s in all; report: {path}")
    return path
