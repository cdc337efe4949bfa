"""`llmevo export`."""

from pathlib import Path
from typing import Annotated

import typer

from llmevo import terminal
from llmevo.bench import Bench
from llmevo.export import export_run
from llmevo.options import RunFolder
from llmevo.runlog import RunState, read_log


def export(
    run: RunFolder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    candidate: Annotated[int | None, typer.Option(help="Its id; the best by default.", show_default=False)] = None,
) -> None:
    """Write the merged model as a Hugging Face folder."""
    state = RunState.fold(iter(read_log(run)))
    bench = Bench.of_log(state.started, run)
    with terminal.console.status("Merging and writing…"):
        export_run(state, bench.sources, out, candidate)
    terminal.console.print(
        f"{out} is a Hugging Face model: AutoModelForCausalLM.from_pretrained({str(out)!r})", highlight=False
    )
