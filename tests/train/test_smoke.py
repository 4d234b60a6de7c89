"""The `smoke` preset: videos → pairs → training → evaluation with a tiny model on a CPU, from the command line."""

import json
from pathlib import Path
from typing import Any

from made_videos import write_video
from synpo.cli import main
from synpo.records import Pair, write_records


def test_the_whole_path_runs_with_the_smoke_preset(tiny_captioner_path: Path, tmp_path: Path, capsys: Any) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for k in range(2):
        write_video(videos / f"{k}.mp4", shade=90 * k, frames=12, rate=4)
    shared = ["--preset", "smoke", "--model", str(tiny_captioner_path), "--videos", str(videos)]
    main(["pairs", *shared, "--pairs", str(tmp_path / "built.jsonl")])  # noise: perhaps no two captions differ in score
    assert (tmp_path / "built.jsonl.work").is_dir()
    rows = [Pair(f"p{i}", f"{i % 2}.mp4", "Describe.", f"A bar falls {i}.", "It rains.") for i in range(4)]
    write_records(tmp_path / "pairs.jsonl", rows)
    assert main(["train", *shared, "--pairs", str(tmp_path / "pairs.jsonl"), "--output", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] == 2
    adapter = ["--adapter", str(tmp_path / "run" / "adapter")]
    assert main(["eval", *shared, *adapter, "--output", str(tmp_path / "run" / "eval")]) == 0
    assert len((tmp_path / "run" / "eval" / "captions.jsonl").read_text().splitlines()) == 2
