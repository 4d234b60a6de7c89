"""Real captions, and a PNG, for the tests of evaluation."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure


@pytest.fixture(scope="session")
def real_captions(real_data: Path) -> list[str]:
    """About 5,000 captions and event sentences of VATEX, DREAM-1k and COCO."""
    folder = real_data / "captions"
    vatex = [c for row in json.loads((folder / "vatex_5_samples.json").read_text()) for c in row["enCap"]]
    coco = [row["caption"] for row in json.loads((folder / "coco_fakecap_results.json").read_text())]
    dream = [json.loads(line) for line in (folder / "DREAM-1k.jsonl").read_text().splitlines()]
    long = [row["messages"][1]["content"][0]["reference"] for row in dream]
    return vatex + coco + long + [event for row in dream[:500] for event in row["extra_info"]["events"]]


@pytest.fixture(scope="session")
def png() -> bytes:
    figure = Figure(figsize=(1, 1))
    figure.subplots().imshow(np.eye(4))
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()
