"""`llmevo extract`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from llmevo.cli import terminal
from llmevo.cli.options import Energy, Parameters, Ranks
from llmevo.cli.written import print_report


def extract(
    fine_tune: Annotated[str, typer.Argument(metavar="FINE_TUNE", help="A folder, a hub id or a GGUF file.")],
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model that it was tuned from.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    rank: Ranks = None,
    energy: Energy = None,
    parameters: Parameters = None,
    tasks: Annotated[
        Path | None,
        typer.Option(metavar="CONFIG", help="Ask base, fine-tune and base with adapter the tasks of a config."),
    ] = None,
) -> None:
    """Write the LoRA adapter of any fine-tune, with its error in every matrix."""
    from llmevo.export.extract import extract as extract_adapter  # torch takes seconds to import

    doing = "Decomposing and writing…" if tasks is None else "Decomposing, writing and asking…"
    with terminal.console.status(doing):
        made = extract_adapter(
            fine_tune, base, out, rank=rank or "auto", energy=energy, parameters=parameters, tasks=tasks
        )
    terminal.console.print(f"{out} is a LoRA adapter for {made.report.servers}, on {base}", soft_wrap=True)
    print_report(made.report)
    if made.scores:
        terminal.console.print()
        table = Table(box=None, pad_edge=False)
        table.add_column("model")
        table.add_column("score", justify="right")
        for of in made.scores:
            table.add_row({"adapter": "base + adapter"}.get(of.model, of.model), f"{of.score:.3f} ± {of.stderr:.3f}")
        terminal.console.print(table)
