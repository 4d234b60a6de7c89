"""The judge behind an endpoint that misbehaves in the ways endpoints do."""

from __future__ import annotations

import dataclasses
import logging
import re
import shutil
import ssl
import subprocess
import time
import traceback
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason="the openai judge needs the extra `judge` (pip install openai pydantic)")

from judge_endpoint import CANDIDATES, GOOD, HONEST, KEY, TASK, Endpoint, Reply, Script, fails, graded, judge_at, says
from synpo.config import ConfigError, JudgeConfig
from synpo.pipeline.judge import Failure, JudgeError, Task, Verdict, make_judge
from synpo.pipeline.judge import openai as openai_module
from synpo.pipeline.judge.openai import OpenAIJudge, RateLimit


@pytest.mark.parametrize("faults", [[fails(429, retry_after="0")], [fails(500), fails(503)]], ids=["429", "5xx"])
def test_passing_faults_are_retried(endpoint: Endpoint, tmp_path: Path, faults: Any) -> None:
    endpoint.script = list(faults)
    assert judge_at(endpoint, tmp_path, orders=1).score(TASK) == HONEST
    assert len(endpoint.requests) == len(faults) + 1


def test_a_server_that_is_no_such_endpoint_stops_the_run(endpoint: Endpoint, tmp_path: Path) -> None:
    """As when base_url lacks its /v1: a page, and not a completion."""
    endpoint.script = [lambda _: (200, {"Content-Type": "text/html"}, b"<html>hello</html>")]
    with pytest.raises(JudgeError, match=r"<html>hello.*judge\.base_url.*/v1"):
        judge_at(endpoint, tmp_path).score(TASK)


def test_an_endpoint_that_never_answered_stops_the_run(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = judge_at(endpoint, tmp_path, orders=1, timeout=0.2)
    config = dataclasses.replace(judge.config, base_url="http://127.0.0.1:9/v1")
    with monkeypatch.context() as without, pytest.raises(JudgeError) as caught:
        without.setattr(openai_module, "RETRIES", 0)
        OpenAIJudge(config, tmp_path / "other.sqlite").score(TASK)
    assert re.search(r"127\.0\.0\.1:9/v1 cannot be reached: .*Connection refused.*judge\.base_url", str(caught.value))
    assert judge.score(TASK) == HONEST

    def late(request: dict[str, Any]) -> Reply:
        time.sleep(0.5)
        return says(graded)(request)

    endpoint.script = [late]
    (first, *_) = judge.score(Task("b.mp4", (), ("x", "y"), (0.0, 0.0)))
    assert first == Failure("no answer within judge.timeout, 0.2 s"), "it did answer before: only this video is lost"
    assert len(endpoint.requests) == 2, "the server may be at work on it still: it is not sent again"
    endpoint.script = [late]
    with pytest.raises(
        JudgeError, match=r"cannot be reached: no answer within judge\.timeout, 0\.2 s.*judge\.max_tokens"
    ):
        judge_at(endpoint, tmp_path / "first", timeout=0.2).score(TASK)
    assert len(endpoint.requests) == 3


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (fails(413, "too long"), "refused the request: Error code: 413 - too long"),
        ((lambda _: (200, {}, {"error": {"message": "no quota"}})), "no quota"),
    ],
    ids=["413", "error in a success"],
)
def test_a_refusal_is_told_as_it_is(endpoint: Endpoint, tmp_path: Path, reply: Script, told: str) -> None:
    endpoint.script = [reply]
    (first, *_) = judge_at(endpoint, tmp_path).score(TASK)
    assert isinstance(first, Failure) and told in first.reason and len(endpoint.requests) == 1


BROKEN = {
    "half a reply": (200, {}, b'{"id": "x", "choices": [{"index": 0, "mess'),
    "no message": (200, {}, {"choices": [{"index": 0, "finish_reason": "error", "message": None}]}),
    "no choice": (200, {}, {"choices": []}),
    "choices of another kind": (200, {}, {"choices": {"message": "x"}}),
    "a choice of another kind": (200, {}, {"choices": ["x"]}),
    "a number": (200, {}, 3),
    "nothing": (200, {}, None),
    "an empty reply": (200, {}, b""),
    "no text": (200, {"Content-Type": "text/plain"}, b"\xff\xfe"),
    "not UTF-8": (200, {}, b'{"choices": [{"message": {"content": "\xff"}}]}'),
    "a number of 5000 digits": says('{"scores": ' + "9" * 5000 + "}")({}),
    "deep nesting": says('{"a": ' * 5000)({}),
    "nesting that json still reads": says('{"a": ' * 600 + "1" + "}" * 600)({}),
    "a reply nested without end": (200, {}, b"[" * 100_000),
    "a deep reply": (200, {}, b'{"id": "x", "choices": ' + b"[" * 800 + b"]" * 800 + b"}"),
    "scores twice": says(GOOD.replace('"fluency"', '"fluency": 1, "fluency"'))({}),
    "a lone surrogate": says(GOOD.replace("scores", "\ud800"))({}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_reply_costs_one_question(endpoint: Endpoint, tmp_path: Path, name: str) -> None:
    judge = judge_at(endpoint, tmp_path, orders=1)
    assert judge.score(TASK) == HONEST
    endpoint.script = [lambda _: BROKEN[name]]
    other = Task("b.mp4", TASK.evidence, CANDIDATES[::-1], TASK.logps)
    assert judge.score(other) == HONEST[::-1]
    assert len(endpoint.requests) == 3


@pytest.mark.parametrize("half", ["\ud83d", "\udcff", "\0"])
def test_a_verdict_beside_what_is_no_text_counts_and_is_kept(endpoint: Endpoint, tmp_path: Path, half: str) -> None:
    endpoint.script = [says(f"Fine {half}. {GOOD}")]
    task = Task(f"{half}.mp4", (half, "clip"), (f"a {half}", "b", "c"), (0.0, 0.0, 0.0))
    first = judge_at(endpoint, tmp_path, structured=False, orders=1).score(task)
    assert all(isinstance(v, Verdict) for v in first) and len(endpoint.requests) == 1
    assert judge_at(endpoint, tmp_path, structured=False, orders=1).score(task) == first
    assert len(endpoint.requests) == 1, "it is kept like any other"
    endpoint.script = [fails(413, f"too long {half}")]
    (failure, *_) = judge_at(endpoint, tmp_path, orders=1).score(Task("b.mp4", (), ("x", "y"), (0.0, 0.0)))
    assert isinstance(failure, Failure) and "too long \ufffd" in failure.reason


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (fails(402, "no money"), "no money"),
        (
            lambda _: (429, {"retry-after": "0"}, {"error": {"message": "pay", "code": "insufficient_quota"}}),
            "lets no more requests through: .*pay.*kept: run again",
        ),
        (fails(429, "today's are used up", retry_after="7200"), "used up.* run again in 7200 s"),
    ],
    ids=["402", "no quota", "a long Retry-After"],
)
def test_an_endpoint_that_wants_money_or_rest_stops_the_run(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reply: Script, told: str
) -> None:
    monkeypatch.setattr(openai_module, "RETRIES", 0)
    endpoint.script = [reply]
    with pytest.raises(JudgeError, match=told):
        judge_at(endpoint, tmp_path).score(TASK)
    assert len(endpoint.requests) == 1


def test_all_wait_where_the_endpoint_goes_on_saying_429(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_module, "RETRIES", 0)
    monkeypatch.setattr(openai_module, "PAUSE", 0.15)
    endpoint.script = [fails(429)] * 5
    assert judge_at(endpoint, tmp_path, orders=1).score(TASK) == HONEST, "five pauses are within its patience"
    assert endpoint.times[-1] - endpoint.times[0] > 0.6 and len(endpoint.times) == 6
    endpoint.script = [fails(429, "slow down")] * 6
    with pytest.raises(JudgeError, match=r"slow down.*judge\.requests_per_minute"):
        judge_at(endpoint, tmp_path / "other", orders=1).score(TASK)


def test_an_endpoint_that_gives_no_more_answers_stops_the_run(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_module, "RETRIES", 0)
    judge = judge_at(endpoint, tmp_path, orders=1, concurrency=2)
    tasks = [Task("a.mp4", (), (f"{i}", "y"), (0.0, 0.0)) for i in range(6)]
    assert isinstance(judge.score(tasks[0])[0], Verdict)
    endpoint.script = [fails(500), fails(503), says(graded), *[fails(502)] * 3]
    for task in (tasks[1], tasks[2]):
        assert isinstance(judge.score(task)[0], Failure)
    assert isinstance(judge.score(tasks[3])[0], Verdict), "an answer: it counts from the start again"
    for task in (tasks[1], tasks[2]):
        assert isinstance(judge.score(task)[0], Failure)
    with pytest.raises(JudgeError, match="gives no more answers"):
        judge.score(tasks[4])


def test_an_endpoint_that_answers_nothing_is_not_asked_about_every_video(endpoint: Endpoint, tmp_path: Path) -> None:
    """As one that knows no JSON schemas: the first questions are given up, then the run."""
    judge = judge_at(endpoint, tmp_path, orders=1, concurrency=2)
    tasks = [Task("a.mp4", (), (f"{i}", "y"), (0.0, 0.0)) for i in range(4)]
    endpoint.script = [fails(400, "unknown field response_format")] * 4
    for task in tasks[:2]:
        assert isinstance(judge.score(task)[0], Failure)
    with pytest.raises(JudgeError, match=r"response_format.*judge\.structured.*3 requests, and none"):
        judge.score(tasks[2])
    endpoint.script.clear()
    assert isinstance(judge.score(tasks[0])[0], Verdict)
    endpoint.script = [fails(400, "too long")] * 3
    assert all(isinstance(judge.score(task)[0], Failure) for task in tasks[1:]), (
        "it does answer: these alone are refused"
    )


def test_the_key_is_nowhere_but_in_the_header(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: Any, capfd: Any, caplog: Any
) -> None:
    caplog.set_level(logging.DEBUG)
    judge = judge_at(endpoint, tmp_path)
    judge.score(TASK)
    endpoint.script = [says("", refusal=f"You sent {KEY}")]
    (first, *_) = judge.score(Task("b.mp4", (), ("p", "q"), (0.0, 0.0)))
    assert isinstance(first, Failure) and KEY not in first.reason
    endpoint.script = [fails(401, f"Incorrect API key provided: {KEY}")]
    with pytest.raises(JudgeError, match="TEST_JUDGE_KEY") as caught:
        judge.score(Task("b.mp4", (), ("x", "y"), (0.0, 0.0)))
    assert KEY not in "".join(traceback.format_exception(caught.value))
    assert all(KEY.encode() not in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert KEY not in "".join(capfd.readouterr())
    assert "chat/completions" in caplog.text and KEY not in caplog.text, "not even where everything is logged"
    assert KEY not in judge.identity + repr(judge.config)
    monkeypatch.delenv("TEST_JUDGE_KEY")
    keyless = OpenAIJudge(JudgeConfig(kind="openai", model="m", key_env="TEST_JUDGE_KEY"), tmp_path / "c.sqlite")
    with pytest.raises(JudgeError, match="set the environment variable TEST_JUDGE_KEY"):
        keyless.score(TASK)
    monkeypatch.setenv("TEST_JUDGE_KEY", "sk-“quoted”")
    with pytest.raises(JudgeError, match="TEST_JUDGE_KEY is no key") as caught:
        keyless.score(TASK)
    assert "quoted" not in str(caught.value)


def test_a_secret_in_the_address_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_module, "RETRIES", 0)
    url = "http://me:hush@127.0.0.1:9/v1?key=hush"
    judge = OpenAIJudge(JudgeConfig(kind="openai", model="m", base_url=url), tmp_path / "c.sqlite")
    with pytest.raises(JudgeError, match=r"http://127\.0\.0\.1:9/v1 cannot be reached") as caught:
        judge.score(TASK)
    assert "hush" not in str(caught.value)


def test_the_address_in_the_environment_counts(endpoint: Endpoint, tmp_path: Path, monkeypatch: Any) -> None:
    """As the openai package has it; answers of one address are not taken for another's."""
    config = JudgeConfig(kind="openai", model="judge", requests_per_minute=1e6)
    elsewhere = OpenAIJudge(config, tmp_path / "c.sqlite").identity
    monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    judge = OpenAIJudge(config, tmp_path / "c.sqlite")
    assert judge.score(TASK) == HONEST and judge.identity != elsewhere


def test_the_budget_and_the_rate_are_kept(endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = judge_at(endpoint, tmp_path, max_requests=3)
    judge.score(TASK)
    with pytest.raises(JudgeError, match="budget of 3 requests"):
        judge.score(Task("b.mp4", (), ("x", "y"), (0.0, 0.0)))
    assert len(endpoint.requests) == 3
    limit = RateLimit(per_minute=600)
    with monkeypatch.context() as at_one_moment:
        at_one_moment.setattr(openai_module.time, "monotonic", lambda: 7.0)
        assert [limit.turn() for _ in range(4)] == pytest.approx([0.0, 0.1, 0.2, 0.3])
        limit.pause(60)
        assert [limit.turn() for _ in range(2)] == pytest.approx([60.0, 60.1])
    slow = judge_at(endpoint, tmp_path / "rate", orders=1, requests_per_minute=600)
    start = time.monotonic()
    for text in "abcd":
        slow.score(Task("a.mp4", (), (text, "y"), (0.0, 0.0)))
    assert time.monotonic() - start >= 0.3


def test_a_cache_that_cannot_be_used_is_named(endpoint: Endpoint, tmp_path: Path) -> None:
    (tmp_path / "judge_cache.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(JudgeError, match=r"judge_cache\.sqlite cannot be used: .*remove it"):
        judge_at(endpoint, tmp_path).check()
    (tmp_path / "folder" / "judge_cache.sqlite").mkdir(parents=True)
    with pytest.raises(JudgeError, match="cannot be used: unable to open"):
        judge_at(endpoint, tmp_path / "folder").check()
    judge = judge_at(endpoint, tmp_path / "other", orders=1)
    with pytest.raises(JudgeError, match="cannot be used"):
        judge._cache._run("INSERT INTO nothing VALUES (1)")


def test_bad_settings(tmp_path: Path) -> None:
    for config, message in (
        (JudgeConfig(kind="opnai"), "did you mean 'openai'"),
        (JudgeConfig(kind="openai"), "judge.model: expected the name of a model"),
        (JudgeConfig(kind="local"), "needs a checkpoint"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_judge(config, tmp_path)
    for name, message in (
        ("requests_per_minute", "above 0"),
        ("concurrency", "at least 1"),
        ("max_tokens", "at least 1"),
        ("max_requests", "at least 1"),
        ("timeout", "above 0"),
        ("orders", "at least 1"),
    ):
        with pytest.raises(ValueError, match=rf"{name}: expected {message}, got 0"):
            JudgeConfig(kind="openai", model="m", **{name: 0})  # type: ignore[arg-type]
    assert not any(tmp_path.iterdir())


ADDRESSES = [
    "localhost:8000/v1",
    "https://…/v1",
    "http://[::1/v1",
    "https:///v1",
    "http://host:99999/v1",
    "http://a b/v1",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_that_is_none_is_named(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not left to the client, which may raise what is no OpenAI error at the first question."""
    with pytest.raises(
        ConfigError, match=r"judge\.base_url: expected the address .* as in https://api\.example\.com/v1"
    ):
        make_judge(JudgeConfig(kind="openai", model="m", base_url=address), tmp_path)
    monkeypatch.setenv("OPENAI_BASE_URL", address.replace("//", "//me:hush@"))
    with pytest.raises(ConfigError, match="OPENAI_BASE_URL: expected the address") as caught:
        make_judge(JudgeConfig(kind="openai", model="m"), tmp_path)
    assert "hush" not in str(caught.value)


def test_a_judge_that_cannot_work_is_known_before_there_is_anything_to_judge(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(openai_module, "RETRIES", 0)
    judge_at(endpoint, tmp_path).check()
    judge_at(endpoint, tmp_path).check()
    assert len(endpoint.requests) == 1, "what it said once is not paid for twice"
    refusals = (fails(401), "refused model"), (fails(400, "no schemas"), "JSON schemas, judge.structured=false")
    for number, (reply, told) in enumerate([*refusals, (fails(503), "does not work: .*503")]):
        endpoint.script = [reply]
        with pytest.raises(JudgeError, match=told):
            judge_at(endpoint, tmp_path / str(number)).check()
    endpoint.script = [says("I would rather not.")]
    judge_at(endpoint, tmp_path / "4").check()
    assert "judge judge gave no verdict on a trial question: there is no JSON object" in capsys.readouterr().err
    monkeypatch.delenv("TEST_JUDGE_KEY")
    with pytest.raises(JudgeError, match="set the environment variable TEST_JUDGE_KEY, which judge.key_env names"):
        judge_at(endpoint, tmp_path / "5").check()
    assert not (tmp_path / "5").exists()


def test_a_server_of_ones_own_may_want_no_key(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    config = JudgeConfig(kind="openai", model="judge", base_url=endpoint.url)
    OpenAIJudge(config, tmp_path / "c.sqlite").check()
    with pytest.raises(JudgeError, match="set the environment variable OPENAI_API_KEY"):
        OpenAIJudge(dataclasses.replace(config, base_url=None), tmp_path / "d.sqlite").check()


def test_an_error_of_the_server_may_mean_that_it_does_not_know_a_setting(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama-cpp-python 0.3.36 answers a JSON schema with 500."""
    monkeypatch.setattr(openai_module, "RETRIES", 0)
    judge = judge_at(endpoint, tmp_path, orders=1, concurrency=1)
    endpoint.script = [fails(500, "Input should be 'text' or 'json_object'")] * 2
    assert isinstance(judge.score(TASK)[0], Failure)
    with pytest.raises(JudgeError, match=r"'json_object'.*JSON schemas, judge\.structured=false; .*temperature=null"):
        judge.score(TASK)
    endpoint.script = [fails(503, "overloaded")] * 2
    other = judge_at(endpoint, tmp_path, orders=1, concurrency=1)
    other.score(TASK)
    with pytest.raises(JudgeError, match=r"503 - overloaded\. See judge\.base_url"):
        other.score(TASK)
    endpoint.script = [fails(404)]
    with pytest.raises(JudgeError, match=r"refused model 'judge'.*404.*judge\.base_url.*/v1"):
        judge_at(endpoint, tmp_path).score(TASK)


def test_a_page_that_a_proxy_sent_is_told(endpoint: Endpoint, tmp_path: Path) -> None:
    page = b"<html><head><title>400</title></head><body>The plain HTTP request was sent<br>to HTTPS port</body></html>"
    endpoint.script = [lambda _: (400, {"Content-Type": "text/html"}, page)]
    (first, *_) = judge_at(endpoint, tmp_path).score(TASK)
    assert isinstance(first, Failure) and "400 The plain HTTP request was sent to HTTPS port;" in first.reason


def test_a_certificate_that_is_not_known_ends_the_run_at_once(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl to make a certificate with")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = [openssl, *["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]]
    subject = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*made, *subject], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    endpoint.server.socket = context.wrap_socket(endpoint.server.socket, server_side=True)
    endpoint.url = endpoint.url.replace("http:", "https:")
    start = time.monotonic()
    with pytest.raises(JudgeError, match=r"cannot be trusted: .*self-signed.*SSL_CERT_FILE"):
        judge_at(endpoint, tmp_path).score(TASK)
    assert time.monotonic() - start < 5, "and is not tried again"
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert judge_at(endpoint, tmp_path).score(TASK) == HONEST
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "nothing.pem"))
    with pytest.raises(JudgeError, match=r"no connection can be opened: .*No such file.*SSL_CERT_FILE"):
        judge_at(endpoint, tmp_path / "other").score(TASK)


def test_a_proxy_in_the_environment_is_named(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_module, "RETRIES", 0)
    for name in ("no_proxy", "NO_PROXY", "http_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://me:hush@127.0.0.1:9")
    with pytest.raises(JudgeError, match=r"through the proxy in HTTP_PROXY; NO_PROXY=127\.0\.0\.1") as caught:
        judge_at(endpoint, tmp_path).score(TASK)
    assert "hush" not in str(caught.value) and not endpoint.requests
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert judge_at(endpoint, tmp_path).score(TASK) == HONEST
    endpoint.script = [fails(407)]
    with pytest.raises(JudgeError, match=r"407.*http://NAME:PASSWORD@"):
        judge_at(endpoint, tmp_path / "wants a name").score(TASK)
    monkeypatch.setenv("HTTP_PROXY", "gopher://127.0.0.1:9")
    with pytest.raises(JudgeError, match=r"no connection can be opened: .*HTTP_PROXY"):
        judge_at(endpoint, tmp_path / "other").score(TASK)


def test_the_length_of_an_answer_is_limited_where_it_is_asked_for(endpoint: Endpoint, tmp_path: Path) -> None:
    judge_at(endpoint, tmp_path, orders=1).score(TASK)
    judge_at(endpoint, tmp_path, orders=1, max_tokens=900).score(TASK)
    assert [r.get("max_tokens") for r in endpoint.requests] == [None, 900]
