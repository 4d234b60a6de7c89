"""One self-contained report.html: no scripts, no external addresses, every text escaped.

    evaluate/show.py   scores, differences, captions side by side ┐
    train/show.py      curves, pairs                              ├→ Report → write_report → report.html
    demo/show.py       both, and what is known of the world       ┘

The page appears complete or not at all. The figures behind it are embedded under the id "figures", so the page alone is enough
to compute with. One colour has one meaning all over it: a system keeps its own, green is chosen or better, red rejected or worse.
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

from synpo.records import atomic_path
from synpo.report import parts
from synpo.report.draw import Curves, chart_html, curves_html, tone
from synpo.report.parts import PairSample, Sample
from synpo.report.style import CSS
from synpo.report.table import Chart, Table
from synpo.text import clean, cleaned


@dataclass(frozen=True)
class Highlight:
    """A figure to see first: "CIDEr", "42.5", "base 38.4, DPO 40.1"; `system` gives it that system's colour."""

    label: str
    value: str
    remark: str = ""
    system: str = ""


@dataclass(frozen=True)
class Group:
    """Samples, or pairs, that are shown for one reason, which `title` and `note` give."""

    title: str
    note: str
    samples: Sequence[Sample | PairSample]


@dataclass(frozen=True)
class Report:
    """Everything in the report, in the order it is read.

    title, lead   what was run; `lead` is plain text
    findings      what came of it, a sentence each
    highlights    a few figures set large
    terms         words of the page and what they mean
    systems       whose names have a colour of their own, the same everywhere
    notes         what to keep in mind when reading the results
    charts        EvalResult.to_charts() and others
    tables        EvalResult.to_table(), to_difference_table() and others
    captions      captions side by side; words that no reference uses are marked
    curves        training over its steps
    training      tables about training
    pairs         what was trained on; words that only one of the two has are marked
    seconds       stage → wall time
    run           versions, machine, seed, command: name → text
    figures       whatever JSON can say (dataclasses, NumPy values, paths and sets too); embedded in the page
    beside        where the figures lie beside the page, "report.json"
    """

    title: str
    lead: str = ""
    findings: Sequence[str] = ()
    highlights: Sequence[Highlight] = ()
    terms: Sequence[tuple[str, str]] = ()
    systems: Sequence[str] = ()
    notes: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    captions: Sequence[Group] = ()
    curves: Sequence[Curves] = ()
    training: Sequence[Table] = ()
    pairs: Sequence[Group] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    run: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)
    beside: str = ""


def write_report(path: str | os.PathLike[str], report: Report) -> None:
    """Write the page to `path`.

    Raises:
        ValueError: an image is neither PNG nor JPEG; a figure is of a type that has no JSON form.
    """
    page = render(report)
    with atomic_path(path) as temporary:
        temporary.write_text(clean(page), encoding="utf-8")


def render(report: Report) -> str:
    """The page as text."""
    embedded = json.dumps(cleaned(plain(dict(report.figures))), ensure_ascii=False).replace("<", "\\u003c")
    body = [
        _head(report),
        _results(report),
        _samples("Captions", report.captions, report.systems),
        _training(report),
        _samples("Preference pairs", report.pairs, report.systems),
        _run(report),
    ]
    beside = f"in {escape(report.beside)}, and " if report.beside else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{escape(report.title)}</title><style>{CSS}</style></head>\n<body><main>\n"
        + "\n".join(filter(None, body))
        + f"\n<footer>The figures of this run are {beside}in this page under the id “figures”.</footer>"
        + f'\n</main><script type="application/json" id="figures">{embedded}</script></body></html>\n'
    )


def _head(report: Report) -> str:
    found = "".join(f"<li>{escape(sentence)}</li>" for sentence in report.findings)
    tiles = "".join(
        f'<div class="tile"><div class="label {"key" if h.system else ""} {tone(h.system, report.systems)}">'
        f'{escape(h.label)}</div><div class="value">{escape(h.value)}</div>'
        f'<div class="remark">{escape(h.remark)}</div></div>'
        for h in report.highlights
    )
    return (
        f"<header><h1>{escape(report.title)}</h1>"
        + (f'<p class="lead">{escape(report.lead)}</p>' if report.lead else "")
        + (f'<ul class="findings">{found}</ul>' if found else "")
        + (f'<div class="tiles">{tiles}</div>' if tiles else "")
        + "</header>"
        + (parts.terms_html(report.terms) if report.terms else "")
    )


def _results(report: Report) -> str:
    if not (report.tables or report.charts):
        return ""
    notes = "".join(f"<p>{escape(note)}</p>" for note in report.notes)
    charts = "".join(chart_html(chart, report.systems) for chart in report.charts)
    tables = "".join(parts.table_html(table, report.systems) for table in report.tables)
    return f'<h2>Results</h2>{notes}<div class="triple">{charts}</div>{tables}'


def _samples(title: str, groups: Sequence[Group], systems: Sequence[str]) -> str:
    said = []
    for group in groups:
        said.append(f'<h3>{escape(group.title)}</h3><p class="legend">{escape(group.note)}</p>')
        said += [parts.sample_html(sample, systems) for sample in group.samples]
    return f"<h2>{title}</h2>{''.join(said)}" if said else ""


def _training(report: Report) -> str:
    if not (report.curves or report.training):
        return ""
    curves = "".join(curves_html(curve, report.systems) for curve in report.curves)
    return "<h2>Training</h2>" + curves + "".join(parts.table_html(table, report.systems) for table in report.training)


def _run(report: Report) -> str:
    if not (report.seconds or report.run):
        return ""
    return (
        "<h2>The run</h2>"
        + (parts.stages_html(report.seconds) if report.seconds else "")
        + (parts.info_html(report.run) if report.run else "")
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
