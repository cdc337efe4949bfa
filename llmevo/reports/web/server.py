"""The server of `llmevo serve`: pages of runs and streams of what is new in them, to read only.

It answers GET and HEAD, opens no file that a request names, and sends pages with a policy that lets them load nothing
else. A request whose `Host` is not one of this machine's names is refused: a foreign page whose name was pointed at
this machine (DNS rebinding) could read the answers otherwise. Other machines need a token.
"""

import errno
import ipaddress
import os
import re
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, parse_qsl, unquote_to_bytes, urlencode, urlsplit

from llmevo.errors import LlmevoError, UserError
from llmevo.reports.html.page import plotly, policy
from llmevo.reports.web.followed import Followed, Runs, message_page

TOKEN = "LLMEVO_TOKEN"
"""The environment variable with a token of the user's own."""
SHORTEST = 16
"""Characters of a token, at least."""
BEAT = 15.0
"""Seconds after which a stream without news says that it is there."""
MOST = 64
"""Streams at the same time, at most."""


@dataclass(frozen=True)
class Access:
    """Who may read."""

    names: frozenset[str]
    """Names of this machine that a request may address, beside its numbers."""
    token: str = ""
    """Empty where none is needed."""
    is_open: bool = False
    """Whether other machines reach the server."""

    @classmethod
    def of(cls, host: str, names: Sequence[str] = ()) -> "Access":
        """Return the access to a server that listens at `host`. With any but a loopback address a token is needed: that
        of the environment, else a new one. Raises UserError for a short one, and for one that no cookie holds.
        """
        token = os.environ.get(TOKEN, "")
        if token and len(token) < SHORTEST:
            raise UserError(
                f"{TOKEN}: it has {len(token)} characters; give {SHORTEST} or more, or unset it for a new one"
            )
        if not re.fullmatch(r"[\w.~-]*", token, re.ASCII):
            raise UserError(f"{TOKEN}: a browser keeps letters, digits and -._~ only; leave the other characters out")
        if not token and not is_loopback(host):
            token = secrets.token_urlsafe(24)
        for name in names:
            if not re.fullmatch(r"[\w.-]+|[0-9a-fA-F:.]+", name):
                raise UserError(f"--allow-host {name}: give the name of a machine alone, without a scheme or a port")
        own = {"localhost"} if is_loopback(host) else {"localhost", socket.gethostname(), socket.getfqdn()}
        return cls(
            frozenset(name.lower().rstrip(".") for name in {*own, host, *names} if name), token, not is_loopback(host)
        )

    def admits(self, host: str) -> bool:
        """Whether a request may have this `Host`: a name of this machine, or a number, which cannot be pointed at
        another machine.
        """
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        except ValueError:
            return False
        return name in self.names or _number(name) is not None

    def knows(self, given: str) -> bool:
        """Whether a token is right; compared in constant time."""
        return secrets.compare_digest(given.encode(errors="replace"), self.token.encode(errors="replace"))


def _number(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    number = _number(host)
    return number.is_loopback if number else host == "localhost"


class Server(ThreadingHTTPServer):
    """Serves `runs` until `stop`. Raises UserError when it cannot listen there."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True

    def __init__(self, runs: Runs, host: str, port: int, access: Access, warn: Callable[[str], None]) -> None:
        """`port` 0 is any free one; `warn` prints a line about a page that fails."""
        self.runs, self.access, self.warn, self.host = runs, access, warn, host
        self.streams = threading.BoundedSemaphore(MOST)
        try:
            self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            super().__init__((host, port), partial(Handler, self))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UserError(f"--port: {port} is in use on {host}; choose another, or 0 for any free one") from None
            if error.errno == errno.EACCES:
                raise UserError(f"--port: {port} needs rights that this user lacks; choose one above 1023") from None
            raise UserError(f"--host: {host} is no address of this machine ({error.strerror or error})") from None
        except OverflowError:
            raise UserError(f"--port: {port} is no port; give 0 to 65535") from None

    @property
    def url(self) -> str:
        """The address to open in a browser, with the token where one is needed."""
        everywhere = self.host in ("", "0.0.0.0", "::")
        name = socket.gethostname() if everywhere else f"[{self.host}]" if ":" in self.host else self.host
        query = f"?{urlencode({'token': self.access.token})}" if self.access.token else ""
        return f"http://{name}:{self.server_port}/{query}"

    def server_bind(self) -> None:
        """Bind without the look-up of a name that HTTPServer makes, which may take seconds."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.host, self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say in one line why a page could not be shown; a viewer who has left is no error."""
        error = sys.exception()
        if error and not isinstance(error, OSError):
            self.warn(f"! a page could not be shown ({type(error).__name__}: {error})")

    @contextmanager
    def serving(self) -> Generator[None]:
        """Follow the runs and answer requests in threads of their own."""
        threads = [threading.Thread(target=each, daemon=True) for each in (self.runs.follow, self.serve_forever)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.runs.close()
            self.shutdown()
            self.server_close()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "llmevo", ""
    timeout = 20
    """Seconds for which a client may be silent in the middle of a request, or may not take what it is sent."""
    SAFE: ClassVar[dict[str, str]] = {
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cross-Origin-Opener-Policy": "same-origin",
        "X-Frame-Options": "DENY",
        "Connection": "close",
    }

    def __init__(self, owner: Server, *given: Any) -> None:
        self.owner = owner
        super().__init__(*given)

    def do_GET(self) -> None:
        """Answer, if the request may be answered."""
        access = self.owner.access
        try:
            place = urlsplit(self.path)
        except ValueError:
            self._say(HTTPStatus.BAD_REQUEST, "This is no address.")
            return
        query = parse_qs(place.query)
        if not access.admits(self.headers.get("Host", "")):
            text = (
                "This name is not known here. Use the address that llmevo serve has printed, or add --allow-host NAME."
            )
            self._say(HTTPStatus.MISDIRECTED_REQUEST, text)
        elif not access.token or self._shown_token(access):
            self._answer(place.path, query)
        elif "token" in query and access.knows(query["token"][-1]):
            rest = urlencode([(name, value) for name, value in parse_qsl(place.query) if name != "token"])
            where = "/" + place.path.lstrip("/\\") + (f"?{rest}" if rest else "")
            cookie = f"{self._cookie}={access.token}; HttpOnly; SameSite=Strict; Path=/"
            self._send(HTTPStatus.SEE_OTHER, b"", Location=where, **{"Set-Cookie": cookie})
        else:
            which = "is wrong" if "token" in query or "Authorization" in self.headers else "is missing"
            text = f"The token {which}. Open the address with ?token=… that llmevo serve has printed in its terminal."
            self._say(HTTPStatus.UNAUTHORIZED, text)

    def do_HEAD(self) -> None:
        """Answer without the content."""
        self.do_GET()

    @property
    def _cookie(self) -> str:
        return f"llmevo-{self.owner.server_port}"  # cookies are not kept apart by ports

    def _shown_token(self, access: Access) -> bool:
        kind, _, given = self.headers.get("Authorization", "").partition(" ")
        if kind.lower() == "bearer" and access.knows(given.strip()):
            return True
        # By hand: other services of the host share the cookies, and `http.cookies` drops all after one that is odd.
        pairs = (pair.strip().partition("=") for pair in self.headers.get("Cookie", "").split(";"))
        return any(name == self._cookie and access.knows(value) for name, _, value in pairs)

    def _answer(self, path: str, query: dict[str, list[str]]) -> None:
        runs = self.owner.runs
        match path.split("/")[1:]:
            case ["plotly.js"]:
                kept = {"Content-Encoding": "gzip", "Cache-Control": "private, max-age=86400"}
                self._send(HTTPStatus.OK, plotly(), "text/javascript; charset=utf-8", **kept)
            case ["" | "events" as what] if runs.single:
                self._run(runs.runs[0], what, query)
            case [""]:
                self._page(runs.page())
            case ["events"]:
                self._stream(None, query)
            case ["compare"] if not runs.single:
                self._compare(query.get("run", []))
            case ["runs", name, "" | "events" as what] if not runs.single and (run := self._named(name)):
                self._run(run, what, query)
            case _:
                self._say(HTTPStatus.NOT_FOUND, "There is no such page, or no such run any more.")

    def _named(self, name: str) -> Followed | None:
        return self.owner.runs.get(os.fsdecode(unquote_to_bytes(name)))

    def _run(self, run: Followed, what: str, query: dict[str, list[str]]) -> None:
        if what == "events":
            self._stream(run, query)
        else:
            self._page(run.page())

    def _compare(self, keys: list[str]) -> None:
        try:
            text = self.owner.runs.compared(keys)
        except LlmevoError as error:
            self._say(HTTPStatus.OK, str(error))
        else:
            self._page(text.encode(errors="replace"), live=False)

    def _stream(self, run: Followed | None, query: dict[str, list[str]]) -> None:
        """Send news as server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""
        runs = self.owner.runs
        if self.command == "HEAD":
            self._head(HTTPStatus.OK, "text/event-stream")
            return
        if not self.owner.streams.acquire(blocking=False):
            self._say(HTTPStatus.SERVICE_UNAVAILABLE, f"More than {MOST} pages are open; close some.")
            return
        try:
            with runs.watching(run):
                if run:
                    run.read()
                self._head(HTTPStatus.OK, "text/event-stream", **{"X-Accel-Buffering": "no"})
                since = self.headers.get("Last-Event-ID") or query.get("from", [""])[0]
                for version, message in runs.news(run, since, BEAT):
                    self.wfile.write(
                        b"id: %s\ndata: %s\n\n" % (version.encode(), message) if message else b": still here\n\n"
                    )
        finally:
            self.owner.streams.release()

    def _say(self, status: HTTPStatus, text: str) -> None:
        self._page(message_page("llmevo serve", text).encode(), status, live=False)

    def _page(self, content: bytes, status: HTTPStatus = HTTPStatus.OK, live: bool = True) -> None:
        rules = f"{policy(live)}; frame-ancestors 'none'"
        self._send(status, content, "text/html; charset=utf-8", **{"Content-Security-Policy": rules})

    def _send(self, status: HTTPStatus, content: bytes, kind: str = "text/plain", **headers: str) -> None:
        self._head(status, kind, **{"Content-Length": str(len(content)), **headers})
        if self.command != "HEAD":
            self.wfile.write(content)

    def _head(self, status: HTTPStatus, kind: str, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Cache-Control": "no-store", "Content-Type": kind, **self.SAFE, **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged: their addresses may have the token."""
