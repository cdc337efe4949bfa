"""`llmevo inspect`."""

from typing import Annotated

import typer

from llmevo.cli import terminal
from llmevo.cli.options import ApiKey, Changes, ConfigFile, Workers, read_settings
from llmevo.run.experiment import Experiment
from llmevo.run.start import check_start


def inspect(
    config: ConfigFile,
    api_key: ApiKey = None,
    workers: Workers = None,
    changes: Changes = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Start the engine and score one merge, to measure the time of a run.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check a config and its models, and show what a run would do, as `run --dry-run` does for all options of a run."""
    settings, root = read_settings(config, changes=changes, engine__workers=workers), config.parent.absolute()
    check_start(settings, root)
    from llmevo.reports.terminal.inspection import show
    from llmevo.run.preflight import inspection  # torch takes seconds to import; the checks above do not need it

    found = inspection.gather(Experiment(settings, root, api_key), measure)
    if json:
        terminal.console.print(found.json(), soft_wrap=True)
    else:
        show(found, terminal.console)
