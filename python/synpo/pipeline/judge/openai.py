"""A judge behind any OpenAI-compatible endpoint.

The openai package retries what is worth retrying (408, 409, 429, 5xx, lost connections; not late answers: client.py) after
pauses that grow and differ from thread to thread, and heeds a Retry-After of up to two minutes. Here: all threads pause where
the endpoint goes on saying 429, answers are validated and asked for again (`chat.py`), requests are spread evenly in time,
counted against a budget, and valid answers kept (`cache.py`), so that no question is paid for twice. The key is read from the
environment when it is needed, and is in no file, message or error.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import openai

from synpo.config import ConfigError, JudgeConfig
from synpo.pipeline.judge.base import JudgeError, Task, Verdict
from synpo.pipeline.judge.cache import ReplyCache
from synpo.pipeline.judge.chat import (
    VERSION,
    Answer,
    ChatJudge,
    GaveUp,
    InvalidAnswer,
    Messages,
    one_message,
    question,
    read_answer,
)
from synpo.pipeline.judge.client import UNTRUSTED, is_address, open_client, reason, shown, without_secrets
from synpo.records import record_id
from synpo.text import clean

RETRIES = 5  # by the openai package, 15 s of pauses in all
PAUSE = 60.0  # seconds nothing is asked where those were all answered with 429: limits are by the minute
PAUSES = 5  # for one question, before the run is given up
TRIAL = Task(
    "trial", ("a red circle moves to the right.",), ("a red circle moves.", "a blue square stands still."), (0.0, 0.0)
)
LONGEST_PAUSE = 600.0  # an endpoint that asks for more stops the run


class RateLimit:
    """Gives one caller a turn every 60 / `per_minute` seconds."""

    def __init__(self, per_minute: float) -> None:
        self._gap = 60 / per_minute
        self._lock = threading.Lock()
        self._next = 0.0

    def turn(self) -> float:
        """Take a turn: the seconds until it comes."""
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._gap
        return turn - now

    def pause(self, seconds: float) -> None:
        """Give no turn for so long."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


class OpenAIJudge(ChatJudge):
    """Asks a chat-completions endpoint.

    Raises:
        ConfigError: no model is named, or a figure is out of range.
        JudgeError: from `score`: no key, no endpoint, refused, unknown model, no money, or the budget is spent.
    """

    def __init__(self, config: JudgeConfig, cache: Path, seed: int = 0) -> None:
        self._endpoint = config.base_url or os.environ.get("OPENAI_BASE_URL") or None
        if not config.model:
            raise ConfigError("judge.model: expected the name of a model, which the openai judge needs, got ''")
        if self._endpoint is not None and not is_address(self._endpoint):
            source = "judge.base_url" if config.base_url else "OPENAI_BASE_URL"
            raise ConfigError(
                f"{source}: expected the address of the endpoint, as in https://api.example.com/v1, got "
                f"{without_secrets(self._endpoint)!r}"
            )
        super().__init__(config.orders, seed)
        self.config = config
        self.name = config.model
        self.workers = config.concurrency
        self.requests = 0
        self._cache = ReplyCache(cache)
        self._rate = RateLimit(config.requests_per_minute)
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._answered = False  # whether anything like an answer has come from the endpoint
        self._lost = 0  # requests without an answer since the last that had one
        self._opened: openai.OpenAI | None = None
        self._key = ""
        self._where = shown(self._endpoint)
        self._parameters: dict[str, Any] = {"model": config.model}
        if config.temperature is not None:
            self._parameters["temperature"] = config.temperature
        if config.max_tokens is not None:
            self._parameters["max_tokens"] = config.max_tokens
        if config.structured:
            schema = {"name": "scores", "schema": Answer.model_json_schema(), "strict": True}
            self._parameters["response_format"] = {"type": "json_schema", "json_schema": schema}
        roles = [] if config.system_role else ["no system role"]
        asked = record_id(VERSION, self._endpoint, self._parameters, config.orders, seed, *roles)
        self.identity = f"openai/{asked}"

    def check(self) -> None:
        """Look for the key, and ask one small question, whose answer is kept. An answer that is no verdict is only told of."""
        self._client()
        if not self._key and self.config.key_env != type(self.config).key_env:
            raise JudgeError(
                f"the judge needs a key: set the environment variable {self.config.key_env}, which judge.key_env names"
            )
        try:
            self.ask(question(TRIAL, range(len(TRIAL.candidates))), 0, len(TRIAL.candidates))
        except GaveUp as error:
            if not self._answered:
                raise JudgeError(f"{self._where} does not work: {error}") from None
            self._warn(error)
        except InvalidAnswer as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        print(f"warning: judge {self.name} gave no verdict on a trial question: {error}", file=sys.stderr)

    def prepare(self, tasks: Sequence[Task]) -> None:
        super().prepare(tasks)
        self._stopped.clear()

    def stop(self) -> None:
        self._stopped.set()

    def ask(self, messages: Messages, attempt: int, count: int) -> list[Verdict]:
        if not self.config.system_role:
            messages = one_message(messages)
        key = self._cache.key(
            endpoint=self._endpoint, version=VERSION, messages=messages, attempt=attempt, **self._parameters
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
        for pauses in range(PAUSES + 1):
            self._take_turn()
            try:
                reply = client.chat.completions.create(messages=cast(Any, messages), **self._parameters)
            except openai.RateLimitError as error:
                self._heed(error, last=pauses == PAUSES)
            except openai.APIError as error:
                raise self._problem(error) from None
            except (ValueError, RecursionError):
                raise InvalidAnswer("it is not JSON, as a reply of the endpoint is") from None
            else:
                return self._text(reply)
        raise AssertionError("the last pause raises")

    def _take_turn(self) -> None:
        with self._lock:
            if self.config.max_requests is not None and self.requests >= self.config.max_requests:
                raise JudgeError(
                    f"the budget of {self.config.max_requests} requests is spent; what is scored is kept: raise "
                    "judge.max_requests and run again to go on"
                )
            self.requests += 1
        if self._stopped.wait(self._rate.turn()):
            raise JudgeError("the run has ended")

    def _heed(self, error: openai.RateLimitError, last: bool) -> None:
        """Pause, or raise JudgeError where that is no use."""
        asked = error.response.headers.get("Retry-After", "")
        seconds = float(asked) if asked.isdecimal() else PAUSE
        if last or seconds > LONGEST_PAUSE or error.code == "insufficient_quota":
            raise JudgeError(
                f"{self._where} lets no more requests through: {self._clean(error)}. What is scored is kept: run again "
                f"{f'in {seconds:.0f} s' if asked else 'later'}, with a lower judge.requests_per_minute if it is a limit of rate"
            ) from None
        self._rate.pause(seconds)

    def _problem(self, error: openai.APIError) -> JudgeError | GaveUp:
        """What an error of the endpoint means: for the run, or for this question alone."""
        said = self._clean(reason(error))
        status = error.status_code if isinstance(error, openai.APIStatusError) else None
        if status in (401, 402, 403, 404, 407):
            hint = {
                404: ". Does it serve that model, and does judge.base_url have all of its path, mostly /v1?",
                407: ". The proxy wants to know who asks: http://NAME:PASSWORD@…",
            }.get(status, "")
            return JudgeError(
                f"{self._where} refused model {self.config.model!r} with the key in {self.config.key_env}: {said}{hint}"
            )
        with self._lock:
            self._lost += 1
            many = self._lost > self.workers
        if status is not None and status < 500 and status not in (408, 409):
            refused = f"the endpoint refused the request: {said}{self._settings() if status in (400, 422) else ''}"
            if many and not self._answered:
                return JudgeError(f"{refused} ({self._lost} requests, and none was answered)")
            return GaveUp(refused)
        if isinstance(error, openai.APITimeoutError):
            none = f"no answer within judge.timeout, {self.config.timeout:g} s"
        elif UNTRUSTED in said:
            return JudgeError(f"{self._where} cannot be trusted: {said}")
        else:
            none = f"no answer after {RETRIES} retries: {said}"
        if not many and (self._answered or status):
            return GaveUp(none)
        hint = self._settings() if status == 500 and not self._answered else ""
        return JudgeError(
            f"{self._where} {'gives no more answers' if self._answered else 'cannot be reached'}: {none}{hint}. See "
            "judge.base_url, and if it is slow judge.timeout, judge.max_tokens and judge.concurrency; what is scored is kept"
        )

    def _settings(self) -> str:
        """What was sent that an endpoint may not take, with the setting that leaves it out."""
        sent = (
            ("JSON schemas", "structured=false", self.config.structured),
            ("system messages", "system_role=false", self.config.system_role),
            ("this temperature", "temperature=null", self.config.temperature is not None),
            ("max_tokens", "max_tokens=null", self.config.max_tokens is not None),
        )
        known = [f"{what}, judge.{how}" for what, how, there in sent if there]
        return f"; if it does not take {'; '.join(known)}" if known else ""

    def _text(self, reply: Any) -> str:
        """What the model said; `reply` is a chat completion, or whatever a server that is no such endpoint sent."""
        if not isinstance(reply, openai.types.chat.ChatCompletion):
            what = f"{self._where} answers, but not as a chat-completions endpoint: {self._clean(reply)!r:.100}"
            if self._answered:
                raise InvalidAnswer(what)
            raise JudgeError(f"{what}. Does judge.base_url lack its last part, /v1?")
        with self._lock:
            self._answered, self._lost = True, 0
        if problem := getattr(reply, "error", None):  # some gateways report a failure as a success
            raise GaveUp(f"the endpoint refused the request: {self._clean(problem)}")
        try:
            choice = reply.choices[0]
            finish, refusal, said = choice.finish_reason, choice.message.refusal, cast(Any, choice.message.content)
        except (AttributeError, LookupError, TypeError):
            raise InvalidAnswer("it has no message") from None
        if finish == "length":
            raise InvalidAnswer("it was cut off before its end (by judge.max_tokens, or by the endpoint's own limit)")
        if refusal:
            raise GaveUp(f"the model refused: {self._clean(refusal)}")
        if not isinstance(said, str | None):
            raise InvalidAnswer("its content is no text")
        return clean(said or "")

    def _client(self) -> openai.OpenAI:
        """The client, opened with the key from the environment when it is first needed."""
        with self._lock:
            if self._opened is None:
                self._key = os.environ.get(self.config.key_env, "").strip()
                if not self._key and self._endpoint is None:
                    raise JudgeError(f"the judge needs a key: set the environment variable {self.config.key_env}")
                if not (self._key.isascii() and self._key.replace(" ", "x").isprintable()):
                    raise JudgeError(
                        f"the key in {self.config.key_env} is no key: it has characters no header may have"
                    )
                key = self._key or "none"  # servers of one's own often want none
                try:
                    self._opened = open_client(key, self._endpoint, RETRIES, self.config.timeout)
                except ValueError as error:
                    raise JudgeError(self._clean(error)) from None
            return self._opened

    def _clean(self, said: object) -> str:
        """What was said, without the key, in one line."""
        text = clean(" ".join(str(said).split()))
        return (text.replace(self._key, "…") if self._key else text)[:300]
