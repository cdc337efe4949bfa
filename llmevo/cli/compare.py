"""`llmevo compare`."""

from pathlib import Path
from typing import Annotated

import typer

from llmevo.cli import options, terminal
from llmevo.config import config_text, parse_changes
from llmevo.errors import ProposerError, UserError
from llmevo.reports.comparison.compare import Comparison
from llmevo.reports.comparison.compare import compare as compared
from llmevo.reports.comparison.tables import publish
from llmevo.reports.terminal.comparison import play, report
from llmevo.reports.text import say
from llmevo.run.comparison import ComparisonRuns, optimizers_of
from llmevo.run.log.storage import runs_in, shared_folder
from llmevo.run.start import check_start
from llmevo.search.paths.registry import every


def compare(
    context: typer.Context,
    what: Annotated[
        list[Path], typer.Argument(metavar="CONFIG|RUN…", help="A config to run, or finished runs to compare.")
    ],
    optimizers: Annotated[
        str, typer.Option(help=f"Of a config: some of {', '.join(every())}. llm adds llm-off.")
    ] = "llm,llm-off,cma-es,random",
    seeds: Annotated[int, typer.Option(min=1, help="Of a config: runs of each optimizer, from search.seed on.")] = 3,
    budget: options.Budget = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Output folder; by default runs/CONFIG-compare, and of finished runs the folder that all of them lie"
            " in, or the working directory where they lie in several."
        ),
    ] = None,
    api_key: options.ApiKey = None,
    base_url: options.BaseUrl = None,
    model: options.Model = None,
    backend: options.Backend = None,
    workers: options.Workers = None,
    task_search_path: options.TaskFolders = None,
    changes: options.Changes = None,
    mask_names: options.MaskNames = False,
    max_llm_calls: options.MaxCalls = None,
    max_cost: options.MaxCost = None,
    strict_llm: options.Strict = False,
    trust: options.Trust = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print comparison.json instead of tables; progress goes to standard error.")
    ] = False,
) -> None:
    """Run several optimizers with several seeds, or read finished runs, and compare them.

    With several workers (engine.workers) as many runs go on at the same time, each with the results that it has alone.
    The same command continues after any stop; with more seeds or optimizers it adds runs to those that are there.
    """
    if not what[0].is_file():
        runs = runs_in(what)
        way = "finished runs are compared as they are; leave it out, or give a config"
        options.refuse_unused(options.on_command_line(context), ("--out", "--json"), way)
        show(compared(runs), out or shared_folder(runs), as_json)
        return
    if len(what) > 1:
        raise UserError(f"compare: one config, or any number of runs; got {', '.join(map(str, what))}")
    settings = options.read_settings(
        what[0],
        task_search_path,
        changes,
        search__budget=budget,
        llm__base_url=base_url,
        llm__model=model,
        llm__mask_names=mask_names,
        llm__max_calls=max_llm_calls,
        llm__max_cost=max_cost,
        llm__strict=strict_llm,
        engine__backend=backend,
        engine__workers=workers,
    )
    check_start(settings, what[0].parent.absolute())
    folder, root = out or Path("runs") / f"{what[0].stem}-compare", what[0].parent.absolute()
    text = config_text(what[0], parse_changes(changes or []))
    planned = ComparisonRuns(settings, text, root, folder, optimizers_of(optimizers), seeds, api_key, trust)
    planned.check()
    for name in planned.without_llm:
        lacking = f"! {name} runs without an LLM, as llm-off does, for no key, base_url or model is given."
        way_out = f"Give --api-key, or --base-url and --model; or leave {name} out of --optimizers"
        say(terminal.failures, f"{lacking} {way_out}", "yellow")
    try:
        show(play(terminal.failures if as_json else terminal.console, planned), folder, as_json)
    except KeyboardInterrupt:
        terminal.say_stopped(f"Stopped. Nothing is lost: the same command goes on: `{terminal.command_line()}`")
        raise typer.Exit(130) from None
    except ProposerError as error:
        raise ProposerError(f"{error} (llm.strict); the same command goes on from here") from error


def show(comparison: Comparison, out: Path, as_json: bool) -> None:
    """Write the files of a comparison, and print its tables or its numbers."""
    if as_json:
        print(publish(comparison, out))
    else:
        report(terminal.console, comparison, out)
