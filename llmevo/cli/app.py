"""The command line: its commands, each with an example."""

import io
import os
import sys
from importlib.metadata import version as version_of
from typing import Annotated

import setproctitle
import typer

from llmevo.cli import terminal
from llmevo.cli.compare import compare
from llmevo.cli.export import export
from llmevo.cli.inspect import inspect
from llmevo.cli.merge import merge
from llmevo.cli.replay import replay
from llmevo.cli.report import report
from llmevo.cli.resume import resume
from llmevo.cli.run import run
from llmevo.cli.status import status
from llmevo.cli.tasks import tasks
from llmevo.cli.watch import watch
from llmevo.config import check_options
from llmevo.merging.methods.registry import METHODS

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forked data loaders warn about it otherwise


# Read by transformers when a command imports it, which most do not: it takes seconds.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


COMMANDS = {
    run: "llmevo run config.yml --api-key $KEY --model gpt-4o --budget 60",
    resume: "llmevo resume runs/quickstart",
    status: "llmevo status",
    watch: "llmevo watch runs/quickstart",
    replay: "llmevo replay runs/quickstart --verify",
    compare: "llmevo compare config.yml --optimizers llm,cma-es,random --seeds 6",
    report: "llmevo report runs/quickstart",
    export: "llmevo export runs/quickstart my-merge",
    merge: "llmevo merge runs/quickstart/best.yml my-merge",
    inspect: "llmevo inspect config.yml",
    tasks: "llmevo tasks --match 'arc*' --trainable",
}


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Evolve the merge of your fine-tuned language models, with a language model in the loop.",
)


for command, example in COMMANDS.items():
    app.command(epilog=f"Example: `{example}`")(terminal.with_stop_line(command))


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    if version:
        terminal.console.print(f"llmevo {version_of('llmevo')}; merge methods: {', '.join(METHODS)}", highlight=False)
        raise typer.Exit


def main() -> None:
    """The entry point: hides the key from the list of processes, then does what is asked."""
    setproctitle.setproctitle("llmevo " + " ".join(terminal.without_key(sys.argv[1:])))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log file is followed while the run goes on
    with terminal.errors_shown(), terminal.stoppable():
        check_options(sys.argv[1:])
        app()
