"""The part of a worker that is the same on every host: greet, load the engine, answer one job after the other."""

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llmevo.errors import CandidateError, LlmevoError, MachineError, UserError, machine_error
from llmevo.workers.protocol import (
    Answered,
    Hello,
    Job,
    Lost,
    Message,
    PartScorer,
    Ready,
    Refused,
    ScorerFactory,
    Unscorable,
)


@dataclass
class Service:
    """A scorer that answers in messages. It raises nothing."""

    scorer_factory: ScorerFactory
    scorer: PartScorer | None = None
    _warnings: list[str] = field(default_factory=list[str])

    def hello(self) -> Message:
        """Make the scorer and say what decides its scores."""

        def greet() -> Message:
            self.scorer = self.scorer_factory()
            self.scorer.warn = self._warnings.append
            devices = os.environ.get("CUDA_VISIBLE_DEVICES")
            place = f"{platform.node()}, process {os.getpid()}" + (f", GPU {devices}" if devices else "")
            return Hello(self.scorer.facts(), place)

        return _spoken(greet)

    def begin(self) -> Message:
        """Load the engine."""

        def start() -> Message:
            assert self.scorer
            self.scorer.start()
            return Ready(self._said())

        return _spoken(start)

    def _said(self) -> Sequence[str]:
        """Take the warnings since the last message."""
        said, self._warnings[:] = [*self._warnings], []
        return said

    def answer(self, job: Job) -> Message:
        """Answer a job."""

        def score() -> Message:
            assert self.scorer
            started = time.monotonic()
            try:
                return Answered(*self.scorer.score_part(job), self._said())
            except CandidateError as error:
                return Unscorable(str(error), error.took(time.monotonic() - started), self._said())

        return _spoken(score)


def _spoken(act: Callable[[], Message]) -> Message:
    """Return what `act` returns, or its error as a message."""
    try:
        return act()
    except CandidateError as error:
        return Unscorable(str(error))
    except MachineError as error:
        return Lost(str(error))
    except UserError as error:
        return Refused(str(error))
    except LlmevoError as error:  # the engine does not hold the weights that were merged into it
        return Refused(str(error))
    except Exception as error:  # one worker's trouble must not end the run
        found = machine_error(error)
        return Lost(str(found) if found else f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")
