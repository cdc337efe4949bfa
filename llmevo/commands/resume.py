"""`llmevo resume`."""

from typing import Annotated

import typer

from llmevo import resuming
from llmevo.bench import config_of
from llmevo.budget import parse_budget
from llmevo.commands.live import carry_on, check_terminal, warned
from llmevo.options import ApiKey, Budget, Loggers, RunFolder, Trust, with_loggers
from llmevo.runlog import LOG, RunLog
from llmevo.state import RunState

Force = Annotated[bool, typer.Option("--force", help="Go on though config, questions or models have changed.")]


def resume(
    run: RunFolder,
    budget: Budget = None,
    force: Force = False,
    trust: Trust = False,
    logger: Loggers = None,
    api_key: ApiKey = None,
) -> None:
    """Go on with a run after any stop; nothing it has paid for is done again.

    With another `--budget`, also after its end.
    """
    with RunLog(run, resume=True) as log:
        new = parse_budget(*budget) if budget else None
        state = RunState.fold(iter(log.recorded))
        if state.started and (new or not state.finished):
            check_terminal(config_of(state.started, f"{run}/{LOG}"))
        bench = resuming.prepare(log, budget=new, force=force, api_key=api_key, trusted=trust, warn=warned)
        carry_on(bench, log, with_loggers(bench.config, logger))
