"""Workers that several runs share, as one of the runs sees them."""

from collections.abc import Callable
from dataclasses import replace

from llmevo.workers.protocol import Notice, Request, Result, Workers


class SharedWorkers:
    """Workers that score one request of a run at a time, and other runs' meanwhile."""

    count = 1

    def __init__(self, workers: Workers, run: str) -> None:
        """`workers` are this process, or a run_queue of a pool."""
        self.observe: Callable[[Notice], None] = lambda _: None
        self._workers, self._run = workers, run
        workers.observe = self._notice
        self._ids: dict[int | str, int | str] = {}
        """{id among the requests of all runs: the run's own}."""

    @property
    def free(self) -> int:
        return int(not self._ids)

    def _notice(self, notice: Notice) -> None:
        """Name the run's own requests as the run does, and no others."""
        self.observe(notice.model_copy(update={"request": self._ids.get(notice.request or "")}))

    def submit(self, request: Request) -> None:
        name = f"candidate {request.id}" if isinstance(request.id, int) else request.id
        shared = f"{self._run}: {name}"
        self._ids[shared] = request.id
        self._workers.submit(replace(request, id=shared, run=self._run))

    def result(self) -> Result:
        result = self._workers.result()
        return replace(result, id=self._ids.pop(result.id))

    def close(self) -> None:
        """Leave the workers to the other runs."""
        self._workers.close()
