"""A run recomputed from its log: candidate by candidate, with the recorded replies and scores; no model is read."""

from collections.abc import Sequence
from pathlib import Path

from llmevo import events, loop, trust
from llmevo.bench import Bench
from llmevo.errors import RunError
from llmevo.journal import EndOfRecordError, Journal
from llmevo.runlog import LOG


def verify(recorded: Sequence[events.Event], run: Path, trusted: bool = False) -> bool:
    """Whether the run is finished; an unfinished one is verified as far as it goes.

    Raises RunError with the first line that does not follow from those before it. Genes, recipes, origins, the
    optimizer's state and everything that is read off other events have to be equal; `sigma` and `trust`, by which
    nothing is decided, to six digits. RunError also for a log of another machine with prompt templates that are not
    llmevo's, unless it is `trusted`: see `llmevo.trust`.
    """
    begun = next((event for event in recorded if isinstance(event, events.RunStarted)), None)
    trust.check_templates(recorded, run, trusted)
    bench = Bench.of_log(begun, run)
    try:
        loop.run(bench, Journal(recorded))
    except EndOfRecordError:
        return False
    except RunError as error:
        raise RunError(f"{run / LOG if run.is_dir() else run}: {error}") from error
    return True
