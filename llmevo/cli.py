"""The command line."""

import io
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forked data loaders warn about it otherwise

import setproctitle
import transformers
import typer
from rich.console import Console

from llmevo import __version__, display, inspection, loop, scoreboard
from llmevo.bench import Bench
from llmevo.compare import compare as compared
from llmevo.config import read_config
from llmevo.errors import LlmevoError, ProposerError, UserError
from llmevo.export import export_run
from llmevo.journal import EndOfRecordError, Journal
from llmevo.methods import METHODS
from llmevo.optimizers import OPTIMIZERS
from llmevo.options import (
    ApiKey,
    Backend,
    BaseUrl,
    Budget,
    ConfigFile,
    MaskNames,
    MaxCalls,
    MaxCost,
    Model,
    OptimizerName,
    RunFolder,
    Seed,
    Strict,
    TaskFolders,
    read_settings,
)
from llmevo.recipe import Recipe
from llmevo.results import runs_in
from llmevo.runlog import RunLog, RunState, check_free, read_log
from llmevo.sources import Sources
from llmevo.tournament import Tournament, contestants
from llmevo.writing import write_model

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Evolve the merge of your fine-tuned language models, with a language model in the loop.",
)
console = Console()
failures = Console(stderr=True)


@app.command(epilog="Example: `llmevo run config.yml --api-key $KEY --model gpt-4o --budget 60`")
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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show space, first prompt and cost; load nothing.")
    ] = False,
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
    bench = Bench(settings, config.parent.absolute(), api_key)
    if dry_run:
        inspection.inspect(bench, console)
        return
    folder = out or free_folder(config.stem)
    check_free(folder)
    bench.check()
    with RunLog(folder) as log:
        log.write("config.yml", config.read_text())
        carry_on(bench, log)


@app.command(epilog="Example: `llmevo compare config.yml --optimizers llm,cma-es,random --seeds 6`")
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
) -> None:
    """Run optimizers side by side for several seeds, or read finished runs: table, picture and numbers.

    The same command goes on after any stop, and with more seeds or optimizers adds to what is there.
    """
    if not what[0].is_file():
        folder = out or Path(os.path.commonpath([place.absolute() for place in what]))
        scoreboard.report(console, compared(runs_in(what)), folder)
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
    folder, root = out or Path("runs") / f"{what[0].stem}-compare", what[0].parent.absolute()
    tournament = Tournament(settings, what[0].read_text(), root, folder, contestants(optimizers), seeds, api_key)
    tournament.check()
    try:
        scoreboard.play(console, tournament)
    except KeyboardInterrupt:
        again = "llmevo " + " ".join(without_key(sys.argv[1:]))
        console.print(
            f"\nStopped. Nothing is lost: the same command goes on: `{again}`", highlight=False, soft_wrap=True
        )
        raise typer.Exit(130) from None
    except ProposerError as error:
        raise ProposerError(f"{error} (llm.strict); the same command goes on from here") from error


@app.command(epilog="Example: `llmevo resume runs/quickstart`")
def resume(run: RunFolder, api_key: ApiKey = None) -> None:
    """Go on with a run after any stop; nothing it has paid for is done again."""
    with RunLog(run, resume=True) as log:
        state = RunState.fold(iter(log.recorded))
        carry_on(Bench.of_log(state.started, run, api_key), log)


@app.command(epilog="Example: `llmevo replay runs/quickstart --verify`")
def replay(
    run: RunFolder,
    verify: Annotated[bool, typer.Option("--verify", help="Recompute it from the log; fail on a difference.")] = False,
    picture: Annotated[
        Path | None, typer.Option(help="Save the display as it was in the end, as SVG.", show_default=False)
    ] = None,
) -> None:
    """Show a run again, from its log alone."""
    recorded = read_log(run)
    state = RunState.fold(iter(recorded))
    bench = Bench.of_log(state.started, run)
    settings = bench.config
    if picture:
        canvas = Console(record=True, width=118, file=io.StringIO(), force_terminal=True)
        canvas.print(display.Display(canvas, settings, run).picture(state))
        canvas.save_svg(str(picture), title="llmevo run")
        return
    if not verify:
        view, shown = display.Display(console, settings, run), RunState()
        for event in recorded:
            shown.apply(event)
            if line := view.line(event, shown):
                console.print(line, highlight=False, markup=False, soft_wrap=True)
        display.summary(console, state, run, settings)
        return
    try:
        loop.run(bench, Journal(recorded))
    except EndOfRecordError:
        console.print("The run is unfinished; `llmevo resume` goes on with it.")
    console.print(f"Verified: {len(recorded)} events follow from the config, the LLM's replies and the scores.")


@app.command(epilog="Example: `llmevo export runs/quickstart my-merge`")
def export(
    run: RunFolder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    candidate: Annotated[int | None, typer.Option(help="Its id; the best by default.", show_default=False)] = None,
) -> None:
    """Write the merged model as a Hugging Face folder."""
    state = RunState.fold(iter(read_log(run)))
    bench = Bench.of_log(state.started, run)
    with console.status("Merging and writing…"):
        export_run(state, bench.sources, out, candidate)
    console.print(f"{out} is a Hugging Face model: AutoModelForCausalLM.from_pretrained({str(out)!r})", highlight=False)


@app.command(epilog="Example: `llmevo merge runs/quickstart/best.yml my-merge`")
def merge(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yml", help="A mergekit recipe.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    seed: Annotated[int, typer.Option(help="Of random masks.")] = 0,
) -> None:
    """Carry out a mergekit recipe. Methods: the ones llmevo searches over."""
    try:
        parsed = Recipe.from_yaml(recipe.read_text(), str(recipe))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{recipe}: cannot be read ({error})") from error
    with console.status("Merging and writing…"):
        write_model(parsed, Sources.open(parsed.references, recipe.parent), out, seed)
    console.print(f"{out} is a Hugging Face model.", highlight=False)


@app.command(epilog="Example: `llmevo inspect config.yml`")
def inspect(config: ConfigFile, api_key: ApiKey = None) -> None:
    """Check a config and its models, and show what a run would do; the same as `run --dry-run`."""
    inspection.inspect(Bench(read_config(config), config.parent.absolute(), api_key), console)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    if version:
        console.print(f"llmevo {__version__}; merge methods: {', '.join(METHODS)}", highlight=False)
        raise typer.Exit


def carry_on(bench: Bench, log: RunLog) -> None:
    """Run to the end, or to Ctrl-C, showing what happens."""
    view = display.Display(console, bench.config, log.folder)
    try:
        with view:
            state = loop.carry_on(bench, log, [view.show])
    except KeyboardInterrupt:
        console.print(f"\nStopped. Nothing is lost: `llmevo resume {log.folder}` goes on.", highlight=False)
        raise typer.Exit(130) from None
    except ProposerError as error:
        raise ProposerError(f"{error} (llm.strict); `llmevo resume {log.folder}` goes on from here") from error
    display.summary(console, state, log.folder, bench.config)


def free_folder(name: str) -> Path:
    """runs/NAME, or the first of runs/NAME-2, -3, ... that holds no run."""
    folder, number = Path("runs") / name, 2
    while folder.exists():
        folder, number = Path("runs") / f"{name}-{number}", number + 1
    return folder


@contextmanager
def errors_shown() -> Generator[None]:
    """One clear message and an exit status instead of a traceback, for the errors llmevo raises on purpose."""
    try:
        yield
    except UserError as error:
        failures.print(f"Error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(2) from None
    except LlmevoError as error:
        failures.print(f"Failed: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(1) from None


def main() -> None:
    """The entry point: hides the key from the list of processes, then does what is asked."""
    setproctitle.setproctitle("llmevo " + " ".join(without_key(sys.argv[1:])))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log file is followed while the run goes on
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with errors_shown():
        app()


def without_key(words: list[str]) -> list[str]:
    """The command line with the value of --api-key hidden."""
    return [
        "***" if before == "--api-key" else ("--api-key=***" if word.startswith("--api-key=") else word)
        for before, word in zip(["", *words], words, strict=False)
    ]
