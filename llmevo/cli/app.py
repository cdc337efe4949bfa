"""The entry point: the commands, each with an example."""

import io
import logging
import os
import sys
from importlib.metadata import version as version_of
from typing import Annotated, Any

import setproctitle
import typer

from llmevo.cli import terminal
from llmevo.cli.compare import compare
from llmevo.cli.dense import dense
from llmevo.cli.export import export
from llmevo.cli.extract import extract
from llmevo.cli.init import init
from llmevo.cli.inspect import inspect
from llmevo.cli.merge import merge
from llmevo.cli.replay import replay
from llmevo.cli.report import report
from llmevo.cli.resume import resume
from llmevo.cli.run import run
from llmevo.cli.scan import scan
from llmevo.cli.serve import serve
from llmevo.cli.status import status
from llmevo.cli.tasks import tasks
from llmevo.cli.watch import watch
from llmevo.config import check_options
from llmevo.errors import UserError
from llmevo.merging.methods.registry import METHODS

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forked data loaders warn about it otherwise
# transformers and datasets read this when a command imports them.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DATASETS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
for logger in ("lm_eval", "lm-eval"):  # once for the whole command; else for every block of questions, which takes time
    logging.getLogger(logger).setLevel(logging.ERROR)

COMMANDS = {
    init: "llmevo init my-fine-tune another-one --base their-base --task questions.jsonl",
    run: "llmevo run config.yml --api-key $KEY --model gpt-4o --budget 60",
    resume: "llmevo resume runs/quickstart",
    status: "llmevo status",
    watch: "llmevo watch runs/quickstart",
    serve: "llmevo serve runs",
    replay: "llmevo replay runs/quickstart --verify",
    compare: "llmevo compare config.yml --optimizers llm,cma-es,random --seeds 6",
    report: "llmevo report runs/quickstart",
    export: "llmevo export runs/quickstart my-merge",
    merge: "llmevo merge runs/quickstart/best.yml my-merge",
    dense: "llmevo dense my-mixture my-model --by widen --experts 2 --text questions.txt",
    extract: "llmevo extract my-fine-tune its-base my-adapter --rank auto --parameters 10M",
    scan: "llmevo scan config.yml --limit 32",
    inspect: "llmevo inspect config.yml",
    tasks: "llmevo tasks --match 'arc*' --trainable",
}
REMOVED = {
    "--what-if": "`llmevo compare CONFIG --optimizers A,B --seeds N` measures what another optimizer or seed finds",
}
"""{option of an earlier version: what to do instead}."""

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Evolve the merge of your fine-tuned language models, with a language model in the loop.",
)
for command, example in COMMANDS.items():
    app.command(epilog=f"Example: `{example}`")(terminal.stop_shown()(command))


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    if version:
        terminal.console.print(f"llmevo {version_of('llmevo')}; merge methods: {', '.join(METHODS)}")
        raise typer.Exit


def main() -> None:
    """Hide the key from the list of processes, and run the command."""
    setproctitle.setproctitle(terminal.command_line().encode(errors="replace").decode())
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # an output file can be followed, in any encoding
            stream.reconfigure(line_buffering=True, errors="replace")
    with terminal.errors_shown(), terminal.stoppable(), terminal.stop_shown():
        for option in REMOVED.keys() & {word.partition("=")[0] for word in sys.argv[1:]}:
            raise UserError(f"{option}: this option was removed; {REMOVED[option]}")
        check_options(sys.argv[1:])
        command: Any = typer.main.get_command(app)
        if not terminal.failures.is_terminal and len(sys.argv) > 1 and "--help" not in sys.argv:
            command.rich_markup_mode = None  # mistakes as plain lines, not in a box of 80 columns
        command()
