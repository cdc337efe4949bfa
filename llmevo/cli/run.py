"""`llmevo run`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from llmevo.cli import options, terminal
from llmevo.cli.live import carry_on, check_terminal, warned
from llmevo.config import config_text
from llmevo.run.experiment import Experiment
from llmevo.run.log.storage import RunLog, holds_run
from llmevo.run.resume import prepare
from llmevo.run.start import check_start, new_log


def run(
    config: options.ConfigFile,
    api_key: options.ApiKey = None,
    base_url: options.BaseUrl = None,
    model: options.Model = None,
    optimizer: options.OptimizerName = None,
    budget: options.Budget = None,
    seed: options.Seed = None,
    backend: options.Backend = None,
    workers: options.Workers = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; runs/CONFIG by default.")] = None,
    task_search_path: options.TaskFolders = None,
    changes: options.Changes = None,
    mask_names: options.MaskNames = False,
    max_llm_calls: options.MaxCalls = None,
    max_cost: options.MaxCost = None,
    strict_llm: options.Strict = False,
    logger: options.Loggers = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show search space, first prompt and cost; load no weights.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in the folder, or begin it if there is none.")
    ] = False,
    force: options.Force = False,
    trust: options.Trust = False,
) -> None:
    """Search for the best merge."""
    settings, changed = options.read_changed(
        config,
        task_search_path,
        changes,
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
        engine__workers=workers,
    )
    settings = options.with_loggers(settings, logger)
    check_start(settings, config.parent.absolute())
    # torch takes seconds to import; the checks above do not need it
    from llmevo.reports.terminal.inspection import show
    from llmevo.run.preflight import inspection

    experiment = Experiment(settings, config.parent.absolute(), api_key)
    if dry_run:
        show(inspection.gather(experiment), terminal.console)
        return
    check_terminal(settings)
    folder = out or (Path("runs") / config.stem if resume else None)
    if folder and resume and holds_run(folder):
        with RunLog(folder, resume=True) as log:
            prepared = prepare(log, settings, experiment.root, force=force, api_key=api_key, trusted=trust, warn=warned)
            carry_on(prepared, log, settings)
        return
    experiment.scorer.warn = warned
    with new_log(experiment, folder or partial(free_folder, config.stem), config_text(config, changed)) as log:
        carry_on(experiment, log, settings)


def free_folder(name: str) -> Path:
    """Return runs/NAME, or the first of runs/NAME-2, -3, … that does not exist."""
    folder, number = Path("runs") / name, 2
    while folder.exists():
        folder, number = Path("runs") / f"{name}-{number}", number + 1
    return folder
