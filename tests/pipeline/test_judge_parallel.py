"""Judging side by side: what is judged is kept, and nothing waits for an endpoint that hangs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from synpo.config import Config
from synpo.pipeline.judge import Failure, JudgeError, Task, Verdict
from synpo.pipeline.judge import parallel as parallel_module
from synpo.pipeline.judge.parallel import judged
from synpo.pipeline.stages import Run, score_candidates
from synpo.records import Caption, Score, read_records

TASKS = {f"{i}.mp4": Task(f"{i}.mp4", (), (f"caption {i}", "other"), (0.0, 0.0)) for i in range(8)}


class ScriptedJudge:
    """Answers at once, but for the videos of `hang`, which wait for `release`, and those of `fail`."""

    name = identity = "scripted"

    def __init__(self, workers: int, hang: Sequence[str] = (), fail: Sequence[str] = ()) -> None:
        self.workers, self.hang, self.fail = workers, hang, fail
        self.order_totals: dict[Task, list[list[float]]] = {}
        self.release = threading.Event()
        self.threads: set[int] = set()
        self.asked: list[str] = []
        self.stopped = False

    def prepare(self, tasks: Sequence[Task]) -> None: ...

    def score(self, task: Task) -> list[Verdict | Failure]:
        if self.stopped:
            raise JudgeError("the run has ended")
        self.asked.append(task.video)
        self.threads.add(threading.get_ident())
        if task.video in self.hang:
            self.release.wait()
        if task.video in self.fail:
            raise JudgeError(f"{task.video} broke the judge")
        return [Verdict(float(task.video[0]) / 2, 1.0, 1.0)] * 2

    def stop(self) -> None:
        self.stopped = True


@pytest.mark.parametrize("workers", [1, 3, 20])
def test_every_task_has_its_own_outcomes(workers: int) -> None:
    judge = ScriptedJudge(workers)
    assert {v: o[0] for v, o in judged(judge, TASKS)} == {v: Verdict(int(v[0]) / 2, 1.0, 1.0) for v in TASKS}
    assert len(judge.asked) == 8 and not judge.stopped
    assert (judge.threads == {threading.get_ident()}) == (workers == 1), "one worker is the main thread, for Ctrl-C"
    assert list(judged(judge, {})) == []


def test_an_error_ends_the_run_though_a_request_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_module, "GRACE", 0.3)
    judge = ScriptedJudge(3, hang=["1.mp4"], fail=["4.mp4"])
    found, start = [], time.monotonic()
    with pytest.raises(JudgeError, match="4.mp4 broke"):
        for video, _ in judged(judge, TASKS):
            found.append(video)
    assert time.monotonic() - start < 5 and judge.stopped
    assert set(found) == set(judge.asked) - {"1.mp4", "4.mp4"}, "all that was judged is handed over first"
    judge.release.set()


def test_answers_on_their_way_have_a_moment() -> None:
    judge = ScriptedJudge(2, hang=["0.mp4"], fail=["1.mp4"])
    threading.Timer(0.2, judge.release.set).start()
    found = []
    with pytest.raises(JudgeError, match="1.mp4 broke"):
        for video, _ in judged(judge, TASKS):
            found.append(video)
    assert found == ["0.mp4"]


def test_whoever_stops_listening_stops_the_judge() -> None:
    judge = ScriptedJudge(2, hang=["7.mp4"])
    answers = judged(judge, TASKS)
    next(answers)
    answers.close()
    assert judge.stopped
    judge.release.set()


def test_a_judge_without_a_verdict_is_not_asked_about_every_video(tmp_path: Path) -> None:
    """As one whose answers are all cut off. Once a verdict is there, failures are only failures."""

    class Useless(ScriptedJudge):
        def score(self, task: Task) -> list[Verdict | Failure]:
            self.asked.append(task.video)
            return [Failure("it was cut off")] * 2 if task.video in self.fail else [Verdict(1.0, 1.0, 1.0)] * 2

    names = [f"{i:02}.mp4" for i in range(30)]
    rows = {v: [Caption(f"{v}{k}", v, None, k, f"{v} {k}", "", 0.0) for k in range(2)] for v in names}
    run = Run(Config(), tmp_path, tmp_path, None)
    with pytest.raises(JudgeError, match=r"none of the first 20 videos .*the last one: it was cut off"):
        score_candidates(run, judge := Useless(1, fail=names), {}, rows)
    assert len(judge.asked) == 20 and len(read_records(Score, tmp_path / "scores.jsonl")) == 40
    for fail in (names[1:], names[1:]):  # the second time, the verdict is one of the run before
        final, _ = score_candidates(run, Useless(1, fail=fail), {}, rows)
        assert len(final) == 60 and sum(not s.failed for s in final.values()) == 2


@pytest.fixture
def slow_endpoint() -> Iterator[tuple[str, threading.Event]]:
    """An endpoint that judges the first three questions, refuses the key or hangs at the fourth, and hangs ever after.

    Its model is called "refuses" or "hangs"; the event is set once a request hangs.
    """
    pytest.importorskip("openai", reason="the openai judge needs the extra `judge` (pip install openai pydantic)")
    hanging, release, lock, count = threading.Event(), threading.Event(), threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                count[0] += 1
                number = count[0]
            if number == 4 and request["model"] == "refuses":
                hanging.wait(20)
                self.reply(401, {"error": {"message": "no such key"}})
            elif number > 3:
                hanging.set()
                release.wait(60)
            else:
                scores = [{"id": i, "factuality": i, "fluency": 1, "consistency": 1} for i in (1, 2)]
                message = {"role": "assistant", "content": json.dumps({"scores": scores})}
                choice = {"index": 0, "finish_reason": "stop", "message": message}
                answer = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
                self.reply(200, answer)

        def reply(self, status: int, body: object) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", hanging
    release.set()
    server.shutdown()
    server.server_close()


CHILD = """
import signal
import sys
from pathlib import Path
from synpo import cli
from synpo.config import Config, JudgeConfig
from synpo.pipeline.judge import make_judge, parallel
from synpo.pipeline.stages import Run, score_candidates
from synpo.records import Caption
parallel.GRACE = 0.5
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell began with &
url, model, work = sys.argv[1], sys.argv[2], Path(sys.argv[3])
def score(args):
    config = JudgeConfig(kind="openai", model=model, base_url=url, orders=1, concurrency=3, requests_per_minute=1e6)
    rows = {f"{i}.mp4": [Caption(f"{i}{k}", f"{i}.mp4", None, k, f"{i} {k}", "", 0.0) for k in "ab"] for i in range(9)}
    score_candidates(Run(Config(), work, work, None), make_judge(config, work), {}, rows)
cli.COMMANDS["presets"] = score
raise SystemExit(cli.main(["presets"]))
"""


@pytest.mark.parametrize("model", ["refuses", "hangs"])
def test_no_process_waits_for_requests_that_hang(
    slow_endpoint: tuple[str, threading.Event], tmp_path: Path, model: str
) -> None:
    url, hanging = slow_endpoint
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OPENAI_API_KEY": "sk-0"}
    environment.pop("SYNPO_DEBUG", None)
    command = [sys.executable, "-c", CHILD, url, model, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert hanging.wait(60)
        if model == "hangs":
            while not (tmp_path / "scores.jsonl").exists() or len(read_records(Score, tmp_path / "scores.jsonl")) < 6:
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
        start = time.monotonic()
        _, said = process.communicate(timeout=40)
    assert time.monotonic() - start < 15
    assert process.returncode == (2 if model == "refuses" else 130)
    assert ("no such key" if model == "refuses" else "goes on from here") in said and "Traceback" not in said
    assert len(read_records(Score, tmp_path / "scores.jsonl")) == 6, "three videos were judged, and are kept"
