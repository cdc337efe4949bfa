"""`llmevo resume`."""

from llmevo.cli.live import carry_on, check_terminal, warned
from llmevo.cli.options import ApiKey, Budget, Force, Loggers, RunFolder, Trust, Workers, with_loggers
from llmevo.config import parse_budget, parse_workers
from llmevo.run.experiment import config_of
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import LOG, RunLog
from llmevo.run.resume import prepare


def resume(
    run: RunFolder,
    budget: Budget = None,
    workers: Workers = None,
    force: Force = False,
    trust: Trust = False,
    logger: Loggers = None,
    api_key: ApiKey = None,
) -> None:
    """Continue a run after any stop, without repeating anything in its log.

    With another `--budget`, also after its end. `--workers` holds until the next stop.
    """
    with RunLog(run, resume=True) as log:
        new = parse_budget(*budget) if budget else None
        state = RunState.fold(iter(log.recorded))
        if state.started and (new or not state.finished):
            check_terminal(config_of(state.started, f"{run}/{LOG}"))
        experiment = prepare(
            log,
            budget=new,
            force=force,
            api_key=api_key,
            trusted=trust,
            warn=warned,
            workers=parse_workers(workers),
        )
        carry_on(experiment, log, with_loggers(experiment.config, logger))
