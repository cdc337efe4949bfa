"""Runs served at a free port of this machine, and viewers without a browser."""

import http.client
import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llmevo.reports.web.followed import Runs
from llmevo.reports.web.server import Access, Server


@contextmanager
def served(place: Path, host: str = "127.0.0.1", port: int = 0, said: list[str] | None = None) -> Generator[Server]:
    """A server, until the end of the block; what it says in the terminal is put into `said`."""
    runs = Runs(place, (said if said is not None else []).append)
    with Server(runs, "127.0.0.1", port, Access.of(host), runs.say) as server, server.serving():
        yield server


def asked(server: Server, path: str, method: str = "GET", **headers: str) -> tuple[http.client.HTTPResponse, str]:
    """The answer to one request, and its text."""
    link = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    link.request(method, path, headers=headers)
    answer = link.getresponse()
    return answer, answer.read().decode()


@contextmanager
def stream(server: Server, path: str, **headers: str) -> Generator[Iterator[dict[str, Any]]]:
    """The messages of a stream as they come."""
    link = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    link.request("GET", path, headers=headers)
    answer = link.getresponse()
    assert answer.status == 200, answer.read()
    try:
        yield (json.loads(line[6:]) for line in iter(answer.readline, b"") if line.startswith(b"data: "))
    finally:
        link.close()


def address(server: Server, path: str = "") -> str:
    """The address of a page, without a token."""
    return f"http://127.0.0.1:{urlsplit(server.url).port}/{path}"
