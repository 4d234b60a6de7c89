"""A judge behind any OpenAI-compatible endpoint.

The openai package retries what is worth retrying (408, 409, 429, 5xx, lost connections) and heeds Retry-After. Here: answers
are validated and asked for again (`chat.py`), requests are spread evenly in time, counted against a budget, and valid answers
kept in an SQLite file, so that no question is paid for twice. The key is read from the environment when it is needed, and is
in no file, message or error.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any, cast

import openai

from synpo.config import ConfigError, JudgeConfig
from synpo.pipeline.judge.base import JudgeError, Verdict
from synpo.pipeline.judge.chat import VERSION, Answer, ChatJudge, GaveUp, InvalidAnswer, Messages, read_answer
from synpo.records import record_id

RETRIES = 5


class ReplyCache:
    """Answers by the hash of what was asked, in one SQLite file; safe to use from several threads.

    Raises JudgeError when the file is no such database, or cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._run("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL)")

    def _run(self, statement: str, *values: str) -> Any:
        """The first row of the result, None where there is none."""
        try:
            with self._lock:
                return self._db.execute(statement, values).fetchone()
        except sqlite3.Error as error:
            raise JudgeError(
                f"the judge's cache {self._path} cannot be used: {error}. Make room if the disk is full; if the file is "
                "damaged, remove it: its questions are then paid for again"
            ) from error

    @staticmethod
    def key(**asked: Any) -> str:
        return hashlib.sha256(json.dumps(asked, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    def get(self, key: str) -> str | None:
        row = self._run("SELECT reply FROM replies WHERE key = ?", key)
        return row[0] if row else None

    def put(self, key: str, reply: str) -> None:
        self._run("INSERT OR REPLACE INTO replies VALUES (?, ?)", key, reply)


class RateLimit:
    """Lets one caller through every 60 / `per_minute` seconds."""

    def __init__(self, per_minute: float) -> None:
        if per_minute <= 0:
            raise ConfigError(f"judge.requests_per_minute: expected more than 0, got {per_minute}")
        self._gap = 60 / per_minute
        self._lock = threading.Lock()
        self._next = 0.0

    def wait(self) -> None:
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._gap
        time.sleep(turn - now)


class OpenAIJudge(ChatJudge):
    """Asks a chat-completions endpoint.

    Raises:
        ConfigError: no model is named, or a figure is out of range.
        JudgeError: from `score`: no key, no endpoint, refused, unknown model, or the budget is spent.
    """

    def __init__(self, config: JudgeConfig, cache: Path, seed: int = 0) -> None:
        if not config.model:
            raise ConfigError("judge.model: the openai judge needs the name of a model")
        if config.concurrency < 1:
            raise ConfigError(f"judge.concurrency: expected at least 1, got {config.concurrency}")
        super().__init__(config.orders, seed)
        self.config = config
        self.name = config.model
        self.workers = config.concurrency
        self.requests = 0
        self._cache = ReplyCache(cache)
        self._rate = RateLimit(config.requests_per_minute)
        self._lock = threading.Lock()
        self._answered = False  # whether anything like an answer has come from the endpoint
        self._opened: openai.OpenAI | None = None
        self._key = ""
        self._parameters: dict[str, Any] = {"model": config.model}
        if config.temperature is not None:
            self._parameters["temperature"] = config.temperature
        if config.structured:
            schema = {"name": "scores", "schema": Answer.model_json_schema(), "strict": True}
            self._parameters["response_format"] = {"type": "json_schema", "json_schema": schema}
        asked = record_id(VERSION, config.base_url, self._parameters, config.orders, seed)
        self.identity = f"openai/{asked}"

    def ask(self, messages: Messages, attempt: int, count: int) -> list[Verdict]:
        key = self._cache.key(
            endpoint=self.config.base_url, version=VERSION, messages=messages, attempt=attempt, **self._parameters
        )
        known = self._cache.get(key)
        if known is not None:
            return read_answer(known, count)
        reply = self._request(messages)
        verdicts = read_answer(reply, count)
        self._cache.put(key, reply)
        return verdicts

    def _request(self, messages: Messages) -> str:
        client = self._client()
        with self._lock:
            if self.config.max_requests is not None and self.requests >= self.config.max_requests:
                raise JudgeError(
                    f"the budget of {self.config.max_requests} requests is spent; what is scored is kept: raise "
                    "judge.max_requests and run again to go on"
                )
            self.requests += 1
        self._rate.wait()
        try:
            reply = client.chat.completions.create(messages=cast(Any, messages), **self._parameters)
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise JudgeError(
                f"{self.config.base_url or 'the endpoint'} refused model {self.config.model!r} with the key in "
                f"{self.config.key_env}: {self._clean(error)}"
            ) from None
        except openai.BadRequestError as error:
            hint = (
                "; if the endpoint knows no JSON schemas, set judge.structured to false"
                if self.config.structured
                else ""
            )
            raise GaveUp(f"the endpoint refused the request: {self._clean(error)}{hint}") from None
        except openai.APIStatusError as error:
            retried = (
                f" after {RETRIES} retries" if error.status_code in (408, 409, 429) or error.status_code >= 500 else ""
            )
            raise GaveUp(f"the endpoint refused the request{retried}: {self._clean(error)}") from None
        except openai.APIError as error:  # no connection, no answer in time
            problem = f"no answer after {RETRIES} retries: {self._clean(error)}"
            if self._answered:
                raise GaveUp(problem) from None
            raise JudgeError(
                f"{self.config.base_url or 'the endpoint'} cannot be reached: {problem} "
                f"See judge.base_url, and judge.timeout ({self.config.timeout:g} s) if it is slow"
            ) from None
        return self._text(reply)

    def _text(self, reply: Any) -> str:
        """What the model said; `reply` is a chat completion, or whatever a server that is no such endpoint sent."""
        if not isinstance(reply, openai.types.chat.ChatCompletion):
            raise JudgeError(
                f"{self.config.base_url or 'the endpoint'} answers, but not as a chat-completions endpoint: "
                f"{self._clean(reply)!r:.100}. Does judge.base_url lack its last part, /v1?"
            )
        self._answered = True
        if problem := getattr(reply, "error", None):  # some gateways report a failure as a success
            raise GaveUp(f"the endpoint refused the request: {self._clean(problem)}")
        if not reply.choices:
            raise InvalidAnswer("it is empty")
        choice = reply.choices[0]
        if choice.finish_reason == "length":
            raise InvalidAnswer("it was cut off before its end")
        if choice.message.refusal:
            raise GaveUp(f"the model refused: {choice.message.refusal[:200]}")
        content = choice.message.content or ""
        if not isinstance(content, str):
            raise InvalidAnswer("its content is no text")
        return content

    def _client(self) -> openai.OpenAI:
        """The client, opened with the key from the environment when it is first needed."""
        with self._lock:
            if self._opened is None:
                self._key = os.environ.get(self.config.key_env, "")
                if not self._key and self.config.base_url is None:
                    raise JudgeError(f"the judge needs a key: set the environment variable {self.config.key_env}")
                self._opened = openai.OpenAI(
                    api_key=self._key or "none",  # servers of one's own often want none
                    base_url=self.config.base_url,
                    max_retries=RETRIES,
                    timeout=self.config.timeout,
                )
            return self._opened

    def _clean(self, said: object) -> str:
        """What was said, without the key, in one line."""
        text = " ".join(str(said).split())
        return (text.replace(self._key, "…") if self._key else text)[:300]
