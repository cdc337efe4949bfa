"""`llmevo report`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from llmevo.cli import terminal
from llmevo.errors import UserError
from llmevo.run.log.storage import runs_in


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="The folder of a run, or of several to compare.")],
    out: Annotated[
        Path | None, typer.Option(help="The page; report.html in the folder by default.", show_default=False)
    ] = None,
) -> None:
    """Write one HTML page that says what came out, and opens without a network; of several runs, a comparison.

    A run may be going on, or have been stopped: then it says how far it has come.
    """
    from llmevo.reports.html.comparison import (
        comparison_page,  # plotly takes its time, and no other command draws with it
    )
    from llmevo.reports.html.page import run_page

    folders = runs_in(runs)
    together = folders[0] if len(folders) == 1 else Path(os.path.commonpath([place.absolute() for place in folders]))
    file = out or together / "report.html"
    text = run_page(folders[0]) if len(folders) == 1 else comparison_page(folders, together.resolve().name)
    try:
        file.write_text(text)
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}); name another file with --out") from error
    terminal.console.print(f"{file} opens in any browser.", highlight=False, soft_wrap=True)
