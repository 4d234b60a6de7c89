"""The report: one file, nothing fetched, every text escaped, every figure in it, written whole or not at all."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synpo.evaluate.bootstrap import Interval
from synpo.report.page import Highlight, Plot, Report, Sample, plain, write_report
from synpo.report.parts import chart_html, duration, stages_html
from synpo.report.table import Chart, Table

EVIL = '<script>alert("x")</script> & <img src=http://a.b/c.png>'


class Page(HTMLParser):
    """Collects tags with their attributes, and checks that they nest."""

    VOID = frozenset(["meta", "img", "br", "line", "circle"])

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture
def report(png: bytes, tmp_path: Path) -> Report:
    plot = tmp_path / "rewards.png"
    plot.write_bytes(png)
    return Report(
        title=f"Title {EVIL}",
        lead=f"Lead {EVIL}",
        highlights=[Highlight("CIDEr", "42.5", EVIL)],
        tables=[Table(f"T {EVIL}", ["system", EVIL], [[EVIL, "1.0\n0.5–1.5"]], {(0, 1)}, notes=[EVIL])],
        charts=[Chart(EVIL, [("base", 1.0, Interval(0.5, 1.5)), (EVIL, 2.0, None)])],
        plots=[Plot(f"P {EVIL}", EVIL, plot), Plot("Q", "", png)],
        samples=[Sample(f"v/{EVIL}.mp4", ["a red dog"], {"base": f"a blue dog {EVIL}", "SynPO": ""}, png)],
        seconds={"render": 12.3, EVIL: 100.0},
        run={"command": EVIL},
        figures={"caption": EVIL, "loss": [1.0, float("nan")]},
    )


def test_the_page_is_self_contained_and_escaped(report: Report, tmp_path: Path) -> None:
    write_report(tmp_path / "out" / "report.html", report)
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page(text)
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "figures"}]
    sources = [attributes["src"] or "" for _, attributes in page.tags if "src" in attributes]
    assert len(sources) == 3
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not any("href" in attributes for _, attributes in page.tags)
    assert "url(" not in text and "@import" not in text
    assert "default-src 'none'" in text
    assert page.texts.count("Title " + EVIL) == 2  # title and heading
    assert "42.5" in page.texts
    assert "0.5–1.5" in page.texts


def test_figures_are_embedded_and_beside_the_page(report: Report, tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", report)
    beside = json.loads((tmp_path / "report.json").read_text())
    assert beside == {"caption": EVIL, "loss": [1.0, "NaN"]}
    found = re.search(r'id="figures">(.*?)</script>', (tmp_path / "report.html").read_text(), re.DOTALL)
    assert found is not None
    assert json.loads(found[1]) == beside
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json", "rewards.png"]


def test_words_that_no_reference_uses_are_marked(tmp_path: Path) -> None:
    sample = Sample("v", ["a red dog, running."], {"base": "The blue dog is running", "two": "cats & <b>"})
    write_report(tmp_path / "r.html", Report("t", samples=[sample]))
    text = (tmp_path / "r.html").read_text()
    assert "The <mark>blue</mark> dog is running" in text
    assert "<mark>cats</mark> <mark>&amp;</mark> <mark>&lt;b&gt;</mark>" in text


def test_an_empty_report_is_a_page_too(tmp_path: Path) -> None:
    write_report(tmp_path / "r.html", Report("Nothing ran"))
    page = Page((tmp_path / "r.html").read_text())
    assert "h2" not in [tag for tag, _ in page.tags]


def test_a_failure_leaves_the_old_report_alone(report: Report, tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", report)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    bad = Report("t", plots=[Plot("p", "", b"\xff\xd8 a JPEG")])
    with pytest.raises(ValueError, match="embeds PNG images, got bytes starting"):
        write_report(tmp_path / "report.html", bad)
    with pytest.raises(ValueError, match=r"figures\.a\[1\] is a object, which has no JSON form"):
        write_report(tmp_path / "report.html", Report("t", figures={"a": [1, object()]}))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_plain_json() -> None:
    value = {"a": np.float32(0.5), 3: np.arange(2), "p": Path("x/y"), "s": {"b", "a"}, "i": Interval(0.0, float("inf"))}
    expected: dict[str, Any] = {
        "a": 0.5,
        "3": [0, 1],
        "p": "x/y",
        "s": ["a", "b"],
        "i": {"low": 0.0, "high": "Infinity"},
    }
    assert plain(value) == expected
    with pytest.raises(ValueError, match="figures.x is a bytes"):
        plain({"x": b"abc"})


@pytest.mark.parametrize(
    "values",
    [
        [(0.0, None)],
        [(5.0, None), (5.0, None)],
        [(1e-6, (0.0, 3e-6))],
        [(42.5, (39.0, 45.0)), (-3.0, (-9.0, 2.0))],
        [(1e9, None)],
    ],
)
def test_chart_positions_stay_inside(values: list[tuple[float, tuple[float, float] | None]]) -> None:
    rows = [("s", value, None if interval is None else Interval(*interval)) for value, interval in values]
    text = chart_html(Chart("m", rows))
    xs = [float(x) for x in re.findall(r'(?:x|x1|x2|cx)="([-\d.]+)"', text)]
    assert all(0 <= x <= 360 for x in xs)
    assert 1 <= text.count('class="grid"') <= 6


def test_durations() -> None:
    assert [duration(s) for s in (0.04, 12.34, 245, 7620)] == ["0.0 s", "12.3 s", "4 min 05 s", "2 h 07 min"]
    assert "Wall time: 1 min 15 s" in stages_html({"a": 30, "b": 45})
