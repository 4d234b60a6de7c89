"""Real captions for the tests of evaluation."""

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_captions(real_data: Path) -> list[str]:
    """About 5,000 captions and event sentences of VATEX, DREAM-1k and COCO."""
    folder = real_data / "captions"
    vatex = [c for row in json.loads((folder / "vatex_5_samples.json").read_text()) for c in row["enCap"]]
    coco = [row["caption"] for row in json.loads((folder / "coco_fakecap_results.json").read_text())]
    dream = [json.loads(line) for line in (folder / "DREAM-1k.jsonl").read_text().splitlines()]
    long = [row["messages"][1]["content"][0]["reference"] for row in dream]
    return vatex + coco + long + [event for row in dream[:500] for event in row["extra_info"]["events"]]
