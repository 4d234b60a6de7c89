"""What a judge has answered, in one SQLite file, so that no question is paid for twice."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from pathlib import Path
from typing import Any

from synpo.pipeline.judge.base import JudgeError
from synpo.text import clean


class ReplyCache:
    """Answers by the hash of what was asked, in one SQLite file; safe to use from several threads.

    The file is opened when it is first needed. Raises JudgeError when the file is no such database, or cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None

    def _run(self, statement: str, *values: str) -> Any:
        """The first row of the result, None where there is none."""
        try:
            with self._lock:
                if self._db is None:
                    self._path.parent.mkdir(parents=True, exist_ok=True)
                    self._db = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None)
                    self._db.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL)")
                return self._db.execute(statement, values).fetchone()
        except sqlite3.Error as error:
            raise JudgeError(
                f"the judge's cache {self._path} cannot be used: {error}. Make room if the disk is full; if the file is "
                "damaged, remove it: its questions are then paid for again"
            ) from error

    @staticmethod
    def key(**asked: Any) -> str:
        return hashlib.sha256(clean(json.dumps(asked, sort_keys=True, ensure_ascii=False)).encode()).hexdigest()

    def get(self, key: str) -> str | None:
        row = self._run("SELECT reply FROM replies WHERE key = ?", key)
        return row[0] if row else None

    def put(self, key: str, reply: str) -> None:
        self._run("INSERT OR REPLACE INTO replies VALUES (?, ?)", key, clean(reply))
