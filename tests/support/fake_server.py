"""A fake OpenAI-compatible server on the loopback interface: answers by script, remembers what it was asked."""

import json
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Answer:
    """One scripted response."""

    body: Any = None
    """Sent as JSON; a text is sent as it is."""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict[str, str])
    silent: bool = False
    """Nothing is ever sent."""
    pause: float = 0.0
    """Seconds between one letter and the next."""


Answering = Callable[[dict[str, Any]], Answer]
"""An answer that hangs on the request's body."""


def chat(content: str | None, finish: str = "stop", prompt: int = 7, completion: int = 3) -> Answer:
    """A chat completion."""
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content}}
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    head = {"id": "x", "object": "chat.completion", "created": 0, "model": "served-model"}
    return Answer({**head, "choices": [choice], "usage": usage})


def refusal(status: int, message: str = "no", **headers: str) -> Answer:
    """An error in OpenAI's form; `retry_after` becomes the header `retry-after`."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer({"error": {"message": message, "type": "error"}}, status, named)


@dataclass
class FakeServer:
    """The running server; the last answer of the script is repeated for ever."""

    script: list[Answer | Answering]
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """The bodies that came, with the header `authorization` beside them."""
    heard: Callable[[Any], None] = lambda _: None
    """Called with the headers of every request."""
    over: threading.Event = field(default_factory=threading.Event)
    """Set in the end, for those who wait."""

    @property
    def questions(self) -> list[dict[str, Any]]:
        """The requests for an answer, without those for the list of models."""
        return [request for request in self.requests if request["path"].endswith("/completions")]

    def next(self) -> Answer | Answering:
        return self.script.pop(0) if len(self.script) > 1 else self.script[0]


@contextmanager
def serving(*script: Answer | Answering) -> Generator[FakeServer]:
    """A server that gives these answers in turn, until the end of the block."""
    fake = FakeServer([*script])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"] or 0)) or b"{}")
            fake.requests.append({**body, "authorization": self.headers["authorization"], "path": self.path})
            fake.heard(self.headers)
            answer = fake.next()
            answer = answer if isinstance(answer, Answer) else answer(body)
            if answer.silent:
                fake.over.wait()
                return
            text = answer.body if isinstance(answer.body, str) else json.dumps(answer.body)
            kind = "text/html" if isinstance(answer.body, str) else "application/json"
            content = text.encode()
            self.send_response(answer.status)
            for name, value in {"content-type": kind, "content-length": str(len(content)), **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(ConnectionError):  # whoever asked may have had enough
                for piece in (content[i : i + 1] for i in range(len(content))) if answer.pause else (content,):
                    self.wfile.write(piece)
                    if answer.pause:
                        fake.over.wait(answer.pause)

        do_GET = do_POST  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            """Keep quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        fake.url = f"http://127.0.0.1:{server.server_port}/v1"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield fake
        finally:
            fake.over.set()
            server.shutdown()
            thread.join()
