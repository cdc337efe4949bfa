"""`llmevo compare`."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from llmevo.cli import terminal
from llmevo.cli.options import (
    ApiKey,
    Backend,
    BaseUrl,
    Budget,
    MaskNames,
    MaxCalls,
    MaxCost,
    Model,
    Strict,
    TaskFolders,
    Trust,
    read_settings,
)
from llmevo.errors import ProposerError, UserError
from llmevo.reports.comparison.compare import compare as compared
from llmevo.reports.terminal.sweep import play, report
from llmevo.run.log.storage import runs_in
from llmevo.run.start import check_start
from llmevo.run.sweep import Sweep, contestants
from llmevo.search.optimizers import OPTIMIZERS


def compare(
    what: Annotated[
        list[Path], typer.Argument(metavar="CONFIG|RUN…", help="A config to run, or finished runs to read.")
    ],
    optimizers: Annotated[
        str, typer.Option(help=f"Of a config: some of {', '.join(OPTIMIZERS)}. llm brings llm-off with it.")
    ] = "llm,llm-off,cma-es,random",
    seeds: Annotated[int, typer.Option(min=1, help="Of a config: runs of each, from its search.seed on.")] = 3,
    budget: Budget = None,
    out: Annotated[
        Path | None, typer.Option(help="Its folder; runs/CONFIG-compare by default.", show_default=False)
    ] = None,
    api_key: ApiKey = None,
    base_url: BaseUrl = None,
    model: Model = None,
    backend: Backend = None,
    task_search_path: TaskFolders = None,
    mask_names: MaskNames = False,
    max_llm_calls: MaxCalls = None,
    max_cost: MaxCost = None,
    strict_llm: Strict = False,
    trust: Trust = False,
) -> None:
    """Run optimizers side by side for several seeds, or read finished runs: table, picture and numbers.

    The same command goes on after any stop, and with more seeds or optimizers adds to what is there.
    """
    if not what[0].is_file():
        folder = out or Path(os.path.commonpath([place.absolute() for place in what]))
        report(terminal.console, compared(runs_in(what)), folder)
        return
    if len(what) > 1:
        raise UserError(f"compare: one config, or any number of runs; got {', '.join(map(str, what))}")
    settings = read_settings(
        what[0],
        task_search_path,
        search__budget=budget,
        llm__base_url=base_url,
        llm__model=model,
        llm__mask_names=mask_names,
        llm__max_calls=max_llm_calls,
        llm__max_cost=max_cost,
        llm__strict=strict_llm,
        engine__backend=backend,
    )
    check_start(settings, what[0].parent.absolute())
    folder, root = out or Path("runs") / f"{what[0].stem}-compare", what[0].parent.absolute()
    tournament = Sweep(settings, what[0].read_text(), root, folder, contestants(optimizers), seeds, api_key, trust)
    tournament.check()
    try:
        play(terminal.console, tournament)
    except KeyboardInterrupt:
        again = "llmevo " + " ".join(terminal.without_key(sys.argv[1:]))
        terminal.say_stopped(f"Stopped. Nothing is lost: the same command goes on: `{again}`")
        raise typer.Exit(130) from None
    except ProposerError as error:
        raise ProposerError(f"{error} (llm.strict); the same command goes on from here") from error
