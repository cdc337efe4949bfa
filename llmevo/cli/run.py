"""`llmevo run`."""

from pathlib import Path
from typing import Annotated

import typer

from llmevo.cli import terminal
from llmevo.cli.live import carry_on, check_terminal, warned
from llmevo.cli.options import (
    ApiKey,
    Backend,
    BaseUrl,
    Budget,
    ConfigFile,
    Force,
    Loggers,
    MaskNames,
    MaxCalls,
    MaxCost,
    Model,
    OptimizerName,
    Seed,
    Strict,
    TaskFolders,
    Trust,
    read_settings,
    with_loggers,
)
from llmevo.run.experiment import Experiment
from llmevo.run.log.storage import RunLog, holds_run
from llmevo.run.resume import prepare
from llmevo.run.start import check_start, new_log


def run(
    config: ConfigFile,
    api_key: ApiKey = None,
    base_url: BaseUrl = None,
    model: Model = None,
    optimizer: OptimizerName = None,
    budget: Budget = None,
    seed: Seed = None,
    backend: Backend = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/CONFIG by default.", show_default=False)] = None,
    task_search_path: TaskFolders = None,
    mask_names: MaskNames = False,
    max_llm_calls: MaxCalls = None,
    max_cost: MaxCost = None,
    strict_llm: Strict = False,
    logger: Loggers = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show space, first prompt and cost; load nothing.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the folder; begin it if there is none.")
    ] = False,
    force: Force = False,
    trust: Trust = False,
) -> None:
    """Search for the best merge."""
    settings = read_settings(
        config,
        task_search_path,
        search__optimizer=optimizer,
        search__budget=budget,
        search__seed=seed,
        llm__base_url=base_url,
        llm__model=model,
        llm__mask_names=mask_names,
        llm__max_calls=max_llm_calls,
        llm__max_cost=max_cost,
        llm__strict=strict_llm,
        engine__backend=backend,
    )
    settings = with_loggers(settings, logger)
    check_start(settings, config.parent.absolute())
    # torch takes seconds to import: mistakes above are told without it
    from llmevo.reports.terminal.inspection import show
    from llmevo.run.preflight import inspection

    experiment = Experiment(settings, config.parent.absolute(), api_key)
    if dry_run:
        show(inspection.gather(experiment), terminal.console)
        return
    check_terminal(settings)
    folder = out or (Path("runs") / config.stem if resume else free_folder(config.stem))
    if resume and holds_run(folder):
        with RunLog(folder, resume=True) as log:
            prepared = prepare(log, settings, experiment.root, force=force, api_key=api_key, trusted=trust, warn=warned)
            carry_on(prepared, log, settings)
        return
    experiment.scorer.warn = warned
    with new_log(experiment, folder, config.read_text()) as log:
        carry_on(experiment, log, settings)


def free_folder(name: str) -> Path:
    """runs/NAME, or the first of runs/NAME-2, -3, ... that holds no run."""
    folder, number = Path("runs") / name, 2
    while folder.exists():
        folder, number = Path("runs") / f"{name}-{number}", number + 1
    return folder
