"""report.html of a training run: what it did to the likelihoods, its curves, and some of the pairs it learnt from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from synpo.evaluate.scores import count
from synpo.machine import described
from synpo.records import Pair, read_jsonl
from synpo.report.frames import strip
from synpo.report.page import Group, Highlight, PairSample, Report, write_report
from synpo.report.parts import duration
from synpo.report.table import Table
from synpo.train.diagnostics import ends, read_log
from synpo.train.plots import PICTURES, Rows, curves

NAMES = {"sft": "SFT", "synpo": "SynPO", "dpo": "DPO", "ipo": "IPO", "simpo": "SimPO", "cpo": "CPO", "orpo": "ORPO"}
OBJECTIVES = {
    "synpo": "Raises the chosen answer above the rejected one by their mean token probabilities, so that the push against a "
    "rejected answer fades as it becomes unlikely; a second term rewards likely chosen tokens and so keeps the language. "
    "No reference model.",
    "dpo": "Raises the log-likelihood of the chosen answer over that of the rejected one, both as against a reference: the model "
    "as it was when training began.",
    "sft": "Makes the chosen answer more likely, and does not look at the rejected one.",
    "ipo": "As DPO, but towards a set distance between the two instead of an ever larger one.",
    "simpo": "As DPO, but by the mean log-likelihood of a token and without a reference, with a margin to be reached.",
    "cpo": "As DPO without a reference, with SFT on the chosen answer.",
    "orpo": "SFT on the chosen answer, with a term for the odds of the chosen against the rejected one.",
}
ENDS = {  # value of the log → what a table calls it
    "synpo/chosen_logp": "log-likelihood of a chosen token",
    "synpo/rejected_logp": "log-likelihood of a rejected token",
    "rewards/accuracies": "chosen more likely than rejected",
    "synpo/grad_balance/chosen": "gradient through the chosen side",
    "synpo/grad_balance/rejected": "gradient through the rejected side",
}
PAIR = ("pair", "Two answers to one prompt: chosen, the better one, and rejected.")
WORDS = (
    PAIR,
    (
        "log-likelihood",
        "Of a token, natural logarithm of the probability the model gives it: 0 is certain, −0.7 one in two.",
    ),
    ("start, end", "Mean over the first and over the last fifth of the steps."),
)


def summary(rows: Rows) -> Table:
    """What training changed: means over the first and over the last fifth of the steps."""
    found = {label: ends(rows, key) for key, label in ENDS.items()}
    return Table(
        "Training", ["", "start", "end"], [[name, *(f"{v:.3f}" for v in pair)] for name, pair in found.items()]
    )


def show(
    output: Path,
    log: Path,
    pairs: Sequence[Pair],
    videos: Path | None,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
) -> Path:
    """Write output/report.html and return its path.

    Args:
        log: train_log.jsonl. pairs: those trained on. videos: the folder their videos are in.
        config, metrics: settings of the run and the content of metrics.json, as JSON values.
    """
    rows = read_log(log)
    objective = metrics["loss_type"]
    name = NAMES.get(objective, objective)
    held: Rows = [
        {"step": row["step"]} | {key.removeprefix("eval_"): value for key, value in row.items()}
        for _, row in read_jsonl(log)
        if "eval_synpo/chosen_logp" in row
    ]
    runs: dict[str, Rows] = {name: rows} | ({"held-out pairs": held} if held else {})
    settings = {section: config[section] for section in ("seed", "model", "frames", "lora", "train")}
    settings["train"] = {key: value for key, value in config["train"].items() if not key.endswith("_token")}
    table = summary(rows)
    tiles = [Highlight(label, end, f"{start} at the start") for label, start, end in table.rows[:3]]
    report = Report(
        title=f"Training with {name}",
        lead=f"{count(metrics['pairs'], 'pair')}, {count(metrics['steps'], 'step')}, {duration(metrics['seconds'])}; "
        f"{metrics['trainable_parameters']:,} parameters trained.",
        findings=[f"Warning: {text}" for text in metrics["warnings"]],
        highlights=tiles,
        terms=[*([(name, OBJECTIVES[objective])] if objective in OBJECTIVES else []), *WORDS],
        curves=[
            curves(picture, {run: found for run, found in runs.items() if found[0].keys() >= {*picture.lines.values()}})
            for picture in PICTURES  # evaluations have no gradients
        ],
        training=[table],
        pairs=_groups(pairs, videos),
        run=described() | {key: str(value) for key, value in settings["train"].items()},
        figures={"metrics": metrics, "settings": settings},
        beside=f"metrics.json and {log.name}",
    )
    path = output / "report.html"
    write_report(path, report)
    return path


def _groups(pairs: Sequence[Pair], videos: Path | None) -> list[Group]:
    """Three pairs: by the judge's margin the widest, the middle one and the narrowest, or the first, middle and last."""
    margins = {pair.id: pair.margin for pair in pairs if pair.margin is not None}
    judged = all(pair.id in margins for pair in pairs)
    order = sorted(pairs, key=lambda pair: -margins[pair.id]) if judged else list(pairs)
    picked = [order[i] for i in sorted({0, len(order) // 2, len(order) - 1})]
    note = f"Of {count(len(pairs), 'pair')} " + (
        "the one with the widest margin of the judge's scores, the middle one, and the one with the narrowest."
        if judged
        else "the first, the middle one and the last."
    )
    shown = [
        PairSample(
            pair.video,
            pair.chosen,
            pair.rejected,
            strip(videos, pair.video) if videos and pair.video else None,
            pair.prompt if isinstance(pair.prompt, str) else pair.prompt[-1]["content"],
            (_score(pair.chosen_score), _score(pair.rejected_score)),
        )
        for pair in picked
    ]
    return [Group("What was learnt from", f"{note} Words that only one of the two has are marked.", shown)]


def _score(score: float | None) -> str:
    return "" if score is None else f"score {score:.1f}"
