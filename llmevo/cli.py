"""The command line."""

import io
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forked data loaders warn about it otherwise

import setproctitle
import transformers
import typer
from rich.console import Console

from llmevo import __version__, display, inspection, loop
from llmevo.bench import Bench
from llmevo.config import read_config
from llmevo.errors import LlmevoError, ProposerError, UserError
from llmevo.export import export_run
from llmevo.journal import EndOfRecordError, Journal
from llmevo.methods import METHODS
from llmevo.optimizers import OPTIMIZERS
from llmevo.recipe import Recipe
from llmevo.runlog import RunLog, RunState, check_free, read_log
from llmevo.sources import Sources
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

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; mergekit-evolve's run as they are.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", help="Key of the LLM's server; better set OPENAI_API_KEY.", show_default=False),
]
Seed = Annotated[int | None, typer.Option(help="Decides everything random.", show_default=False)]


@app.command(epilog="Example: `llmevo run config.yml --api-key $KEY --model gpt-4o --budget 60`")
def run(
    config: ConfigFile,
    api_key: ApiKey = None,
    base_url: Annotated[str | None, typer.Option(help="Your own OpenAI-compatible server.", show_default=False)] = None,
    model: Annotated[str | None, typer.Option(help="The LLM that proposes.", show_default=False)] = None,
    optimizer: Annotated[str | None, typer.Option(help=f"One of {', '.join(OPTIMIZERS)}.", show_default=False)] = None,
    budget: Annotated[int | None, typer.Option(help="Candidates to score.", show_default=False)] = None,
    seed: Seed = None,
    backend: Annotated[str | None, typer.Option(help="auto, hf or vllm.", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/CONFIG by default.", show_default=False)] = None,
    task_search_path: Annotated[
        list[Path] | None, typer.Option(help="Folder with lm-eval tasks; may be repeated.", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show space, first prompt and cost; load nothing.")
    ] = False,
) -> None:
    """Search for the best merge."""
    overrides: dict[str, Any] = {
        "search.optimizer": optimizer,
        "search.budget": budget,
        "search.seed": seed,
        "llm.base_url": base_url,
        "llm.model": model,
        "engine.backend": backend,
    }
    settings = read_config(config, {key: value for key, value in overrides.items() if value is not None})
    if task_search_path:
        paths = [*settings.task_search_path, *(path.absolute() for path in task_search_path)]
        settings = settings.model_copy(update={"task_search_path": paths})
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
