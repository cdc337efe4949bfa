"""Answers that end: only so long and only so late, whatever a server sends."""

import time
from collections.abc import Callable, Iterator

import httpx
import openai

LONGEST = 1_000_000
"""Bytes of an answer at most; a long one of a thinking model has a tenth of that."""

PLAIN = {"accept-encoding": "identity"}
"""The header that asks for answers as they are: packed ones could grow past any limit while they are read."""


class TooLongError(openai.OpenAIError):
    """An answer that does not end, and would come again."""


def bounded(seconds: float) -> Callable[[httpx.Response], None]:
    """A hook for httpx that limits the whole of an answer; httpx's own timeouts begin anew with every byte."""

    def hook(response: httpx.Response) -> None:
        assert isinstance(response.stream, httpx.SyncByteStream)
        response.stream = _Bounded(response.stream, time.monotonic() + seconds)

    return hook


class _Bounded(httpx.SyncByteStream):
    """A stream that raises when it is too long or too late."""

    def __init__(self, stream: httpx.SyncByteStream, end: float) -> None:
        self._stream, self._end = stream, end

    def __iter__(self) -> Iterator[bytes]:
        length = 0
        for chunk in self._stream:
            length += len(chunk)
            if length > LONGEST:
                raise TooLongError(f"the answer is longer than {LONGEST:,} bytes")
            if time.monotonic() > self._end:
                raise httpx.ReadTimeout("the answer did not end in time")
            yield chunk

    def close(self) -> None:
        self._stream.close()
