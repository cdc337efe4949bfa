"""`llmevo resume`."""

from llmevo.bench import Bench
from llmevo.commands.live import carry_on
from llmevo.options import ApiKey, RunFolder
from llmevo.runlog import RunLog, RunState


def resume(run: RunFolder, api_key: ApiKey = None) -> None:
    """Go on with a run after any stop; nothing it has paid for is done again."""
    with RunLog(run, resume=True) as log:
        state = RunState.fold(iter(log.recorded))
        carry_on(Bench.of_log(state.started, run, api_key), log)
