"""Requests of a run to its workers: sent once, their results taken in the order in which they arrive or are needed."""

from collections.abc import Sequence

from llmevo.run.experiment import Experiment
from llmevo.run.log import events
from llmevo.run.log.journal import Journal
from llmevo.workers.protocol import Request, Result


class Dispatcher:
    """What a run asked of its workers. Nothing is sent while a log is read: its results are in the log."""

    def __init__(self, experiment: Experiment, journal: Journal) -> None:
        self._experiment, self._journal = experiment, journal
        self._sent: set[int | str] = set()
        self._arrived: dict[int | str, Result] = {}

    def first_of(self, requests: Sequence[Request]) -> Result:
        """Return the next result of these requests. Those that were not sent yet are sent."""
        self._send(requests)
        return self._take({request.id for request in requests})

    def of(self, request: Request, ahead: Sequence[Request] = ()) -> Result:
        """Return the result of a request. Others, whose results are needed next, are scored meanwhile."""
        several = self._experiment.workers.count > 1
        self._send([request, *ahead] if several else [request])
        return self._take({request.id})

    def _send(self, requests: Sequence[Request]) -> None:
        workers = self._experiment.workers
        workers.observe = lambda notice: self._journal.aside(events.of_notice(notice))
        for request in requests:
            if request.id not in self._sent:
                self._sent.add(request.id)
                workers.submit(request)

    def _take(self, wanted: set[int | str]) -> Result:
        while (found := next((one for one in self._arrived if one in wanted), None)) is None:
            result = self._experiment.workers.result()
            self._arrived[result.id] = result
        self._sent.discard(found)
        return self._arrived.pop(found)
