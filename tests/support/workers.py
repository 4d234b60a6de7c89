"""Test files that are their own worker: started as several processes that talk to each other."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def run_workers(file: str, ranks: Sequence[int], *arguments: str, timeout: float, **environment: str) -> list[int]:
    """Run `python FILE RANK ARGUMENTS…` for all ranks at once, and return their exit codes.

    `environment` is added to this one's. Raises subprocess.TimeoutExpired; nothing is left running.
    """
    given = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    workers = [
        subprocess.Popen([sys.executable, file, str(rank), *arguments], env=given | environment) for rank in ranks
    ]
    try:
        return [worker.wait(timeout=timeout) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
