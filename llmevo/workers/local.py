"""Scoring in this process: one request after the other. The default on a machine with one device."""

import time
from collections import deque
from collections.abc import Callable, Mapping

from llmevo.errors import CandidateError, MachineError
from llmevo.evaluation.score import Score
from llmevo.workers.protocol import Notice, Request, Result

ScoreRequest = Callable[[Request], tuple[Score, Mapping[str, float]]]
"""Scores a request; returns its seconds too, which are empty for a known score."""


class Local:
    """One engine in this process. A lost machine ends the session: there is no other to go on with."""

    count = 1

    def __init__(self, score: ScoreRequest) -> None:
        self.observe: Callable[[Notice], None] = lambda _: None
        self._score = score
        self._requests = deque[Request]()

    @property
    def free(self) -> int:
        return int(not self._requests)

    def submit(self, request: Request) -> None:
        self._requests.append(request)

    def result(self) -> Result:
        request, started = self._requests.popleft(), time.monotonic()
        try:
            score, seconds = self._score(request)
        except CandidateError as error:
            return Result(request.id, None, str(error), error.took(time.monotonic() - started))
        except MachineError as error:
            name = f"candidate {request.id}" if isinstance(request.id, int) else request.id
            raise MachineError(f"{name}: {error}", error.kind) from error
        return Result(request.id, score, seconds=seconds)

    def close(self) -> None:
        self._requests.clear()
