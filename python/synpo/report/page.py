"""One self-contained report.html (no scripts, no external addresses) and, beside it, every figure of the run as report.json.

    tables and charts (evaluate/run.py) + diagnostic plots (train/plots.py) + samples + run info → Report → write_report

Both files appear complete or not at all. The same JSON is embedded in the page under the id "figures", so the page alone
is enough to compute with.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, is_dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from synpo.records import atomic_path, write_json
from synpo.report import parts
from synpo.report.style import CSS
from synpo.report.table import Chart, Table


@dataclass(frozen=True)
class Highlight:
    """A figure to see first: "CIDEr of SynPO", "42.5", "base 38.4, DPO 40.1"."""

    label: str
    value: str
    remark: str = ""


@dataclass(frozen=True)
class Plot:
    """A PNG, as bytes or as a path, with a title above and words below."""

    title: str
    caption: str
    image: bytes | Path


@dataclass(frozen=True)
class Sample:
    """What each system said of one video; `image` is a PNG of its frames, if any."""

    video: str
    references: Sequence[str]
    captions: Mapping[str, str]
    image: bytes | Path | None = None


@dataclass(frozen=True)
class Report:
    """Everything in the report, in the order it is read.

    title, lead   what was run and what came of it; `lead` is plain text, line breaks kept
    highlights    a few figures set large
    tables        EvalResult.to_table(), to_difference_table() and others
    charts        EvalResult.to_charts()
    plots         diagnostics
    samples       captions side by side; words that no reference uses are marked
    seconds       stage → wall time
    run           versions, machine, seed, command: name → text
    figures       whatever JSON can say (dataclasses, NumPy values, paths and sets too); goes to report.json
    """

    title: str
    lead: str = ""
    highlights: Sequence[Highlight] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    plots: Sequence[Plot] = ()
    samples: Sequence[Sample] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    run: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)


def write_report(path: str | os.PathLike[str], report: Report) -> None:
    """Write the page to `path` and its figures to the same name with the suffix .json.

    Raises:
        ValueError: an image is not a PNG; a figure is of a type that has no JSON form.
    """
    target = Path(path)
    data = target.with_suffix(".json")
    figures = plain(dict(report.figures))
    page = render(report, figures, data.name)
    write_json(data, figures)
    with atomic_path(target) as temporary:
        temporary.write_text(page, encoding="utf-8")


def render(report: Report, figures: Any, data_name: str) -> str:
    """The page as text; `figures` are JSON values already."""
    embedded = json.dumps(figures, ensure_ascii=False).replace("<", "\\u003c")
    tiles = "".join(
        f'<div class="tile"><div class="label">{escape(h.label)}</div><div class="value">{escape(h.value)}</div>'
        f'<div class="remark">{escape(h.remark)}</div></div>'
        for h in report.highlights
    )
    body = [f"<header><h1>{escape(report.title)}</h1>"]
    if report.lead:
        body.append(f'<p class="lead">{escape(report.lead)}</p>')
    if tiles:
        body.append(f'<div class="tiles">{tiles}</div>')
    body.append("</header>")
    if report.tables or report.charts:
        body.append("<h2>Results</h2>")
        body += map(parts.table_html, report.tables)
        body.append(f'<div class="triple">{"".join(map(parts.chart_html, report.charts))}</div>')
    if report.plots:
        plots = "".join(parts.plot_html(p.title, p.caption, p.image) for p in report.plots)
        body.append(f'<h2>What happened in training</h2><div class="plots">{plots}</div>')
    if report.samples:
        body.append(
            '<h2>Captions</h2><p class="legend">Words that no reference uses are <mark>underlined</mark>; '
            "they may still be true.</p>"
        )
        body += [parts.sample_html(s.video, s.references, s.captions, s.image) for s in report.samples]
    if report.seconds or report.run:
        body.append("<h2>The run</h2>")
        if report.seconds:
            body.append(parts.stages_html(report.seconds))
        if report.run:
            body.append(parts.info_html(report.run))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{escape(report.title)}</title><style>{CSS}</style></head>\n<body><main>\n"
        + "\n".join(body)
        + f"\n<footer>Every figure of this run is in {escape(data_name)}, and in this page under the id “figures”.</footer>"
        + f'\n</main><script type="application/json" id="figures">{embedded}</script></body></html>\n'
    )


def plain(value: Any, where: str = "figures") -> Any:
    """`value` as JSON can say it: NaN and infinities become the texts "NaN", "Infinity", "-Infinity", so that they are seen.

    Raises:
        ValueError: a value without a JSON form, naming where it is.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, (np.generic, np.ndarray)):
        return plain(value.tolist(), where)
    if isinstance(value, float):
        return (
            value if math.isfinite(value) else "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        )
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value), where)
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, Set):
        return sorted((plain(item, where) for item in value), key=repr)
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    raise ValueError(
        f"{where} is a {type(value).__name__}, which has no JSON form; give numbers, texts, lists or mappings"
    )
