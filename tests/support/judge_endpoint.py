"""A chat-completions endpoint on this machine that misbehaves as it is told, and a judge that asks it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from synpo.config import JudgeConfig
from synpo.pipeline.judge import Task, Verdict, make_judge

KEY = "sk-very-secret-0123456789"
CANDIDATES = ("a red circle.", "a blue square.", "a circle stops.")
TASK = Task("a.mp4", ("a red circle moves.", "it stops."), CANDIDATES, (-1.0, -2.0, -1.5))


def graded(request: dict[str, Any]) -> str:
    """What an honest judge says: a figure that depends on the caption, not on its place."""
    content = request["messages"][-1]["content"]
    document, _ = json.JSONDecoder().raw_decode(content, content.index('{"clips"'))
    scores = [
        {
            "id": c["id"],
            "factuality": 5.0 if "red" in c["text"] else 1.5,
            "fluency": 4,
            "consistency": len(c["text"]) / 10,
        }
        for c in document["candidates"]
    ]
    return json.dumps({"scores": scores})


Reply = tuple[int, dict[str, str], Any]
Script = Callable[[dict[str, Any]], Reply]


class Endpoint:
    """A chat-completions server on this machine. `script` gives the replies in turn; after them it is honest."""

    def __init__(self) -> None:
        self.script: list[Script] = []
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.keys: set[str] = set()
        self.unknown_roles: set[str] = set()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.times.append(time.monotonic())
                endpoint.keys.add(self.headers["Authorization"])
                endpoint.requests.append(request)
                roles = [m["role"] for m in request["messages"]]
                answer = endpoint.script.pop(0) if endpoint.script else says(graded)
                if any(role in endpoint.unknown_roles for role in roles):  # as vLLM 0.32 answers with Gemma's template
                    answer = fails(400, "System role not supported")
                elif "user user" in " ".join(roles):  # and with Gemma's and Mistral's
                    answer = fails(400, "Conversation roles must alternate user/assistant/user/assistant/...")
                status, headers, body = answer(request)
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {
                    "Content-Type": "application/json",
                    **headers,
                    "Content-Length": str(len(data)),
                }.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


def says(content: str | Callable[[dict[str, Any]], str], finish: str = "stop", **message: Any) -> Script:
    """A well-formed reply with this content."""

    def answer(request: dict[str, Any]) -> Reply:
        text = content(request) if callable(content) else content
        choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}
        return 200, {}, {"id": "x", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice]}

    return answer


def fails(status: int, text: str = "no", **headers: str) -> Script:
    return lambda _request: (status, {k.replace("_", "-"): v for k, v in headers.items()}, {"error": {"message": text}})


def judge_at(endpoint: Endpoint, folder: Path, **options: Any) -> Any:
    settings: dict[str, Any] = {"requests_per_minute": 1e6, **options}
    config = JudgeConfig(kind="openai", model="judge", base_url=endpoint.url, key_env="TEST_JUDGE_KEY", **settings)
    return make_judge(config, folder)


HONEST = [Verdict(5.0, 4.0, 1.3), Verdict(1.5, 4.0, 1.4), Verdict(1.5, 4.0, 1.5)]
GOOD = (
    '{"scores": [{"id": 1, "factuality": 2, "fluency": 3, "consistency": 1}, '
    '{"id": 2, "factuality": 1, "fluency": 1, "consistency": 0}, {"id": 3, "factuality": 5, "fluency": 5, "consistency": 3}]}'
)
