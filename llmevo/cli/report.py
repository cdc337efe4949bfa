"""`llmevo report`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from llmevo.cli import terminal
from llmevo.errors import UserError
from llmevo.run.log.storage import runs_in, shared_folder


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="The folder of a run, or of several to compare.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The HTML file; by default report.html in the run's folder, and of several runs in the folder that all"
            " of them lie in, or in the working directory where they lie in several."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead: a list with the candidates and scores of each run.")
    ] = False,
) -> None:
    """Write the results of a run as one HTML page that opens offline; of several runs, a comparison.

    The page of an unfinished run shows its progress.
    """
    if as_json:
        from llmevo.export.runs import open_run

        if out is not None:
            raise UserError(f"--out: {out} is the place of a page; --json prints to the standard output")
        print(json.dumps([open_run(folder).as_dict() for folder in runs_in(runs)], indent=1, allow_nan=False))
        return
    from llmevo.reports.html.comparison import comparison_page  # plotly is slow to import
    from llmevo.reports.html.page import run_page

    folders = runs_in(runs)
    together = shared_folder(folders)
    file = out or together / "report.html"
    text = run_page(folders[0]) if len(folders) == 1 else comparison_page(folders, together.resolve().name)
    try:
        file.write_bytes(text.encode(errors="replace"))  # a folder's name may be no UTF-8
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}); name another file with --out") from error
    terminal.console.print(f"{file} opens in any browser.", soft_wrap=True)
