"""Tasks judged side by side, and an end that waits for no endpoint."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from queue import Empty, SimpleQueue
from threading import Thread

from synpo.pipeline.judge.base import Failure, Judge, Task, Verdict

GRACE = 5.0  # seconds that answers on their way still have when the judge has failed

Outcomes = list[Verdict | Failure]


def judged(judge: Judge, tasks: Mapping[str, Task]) -> Generator[tuple[str, Outcomes]]:
    """(video, its outcomes) as they come, from `judge.workers` threads, or from this one where there is but one worker.

    An error of the judge is raised after what else was ready, or came within GRACE seconds. An interruption, and closing this
    iterator, end it at once. Requests that hang are left behind in daemon threads, which keep no process alive.
    """
    if judge.workers == 1:  # an interruption reaches what runs in the main thread
        for video, task in tasks.items():
            yield video, judge.score(task)
        return
    waiting: SimpleQueue[tuple[str, Task]] = SimpleQueue()
    done: SimpleQueue[tuple[str, Outcomes | Exception]] = SimpleQueue()
    for item in tasks.items():
        waiting.put(item)

    def work() -> None:
        while True:
            try:
                video, task = waiting.get_nowait()
            except Empty:
                return
            try:
                done.put((video, judge.score(task)))
            except Exception as error:
                done.put((video, error))
                return

    threads = [Thread(target=work, daemon=True) for _ in range(min(judge.workers, len(tasks)))]
    for thread in threads:
        thread.start()
    ended = False
    try:
        for _ in tasks:
            video, outcome = done.get()
            if isinstance(outcome, Exception):
                judge.stop()
                deadline = time.monotonic() + GRACE
                for thread in threads:
                    thread.join(max(0.0, deadline - time.monotonic()))
                while not done.empty():
                    late, rest = done.get()
                    if not isinstance(rest, Exception):
                        yield late, rest
                raise outcome
            yield video, outcome
        ended = True
    finally:
        if not ended:
            judge.stop()
