"""`llmevo scan`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from llmevo.cli import options, terminal
from llmevo.cli.live import warned
from llmevo.errors import UserError
from llmevo.run.start import check_start


def scan(
    config: options.ConfigFile,
    of: Annotated[
        str,
        typer.Option("--of", metavar="NAME", help="The model to scan, or merge; by default the best of the config."),
    ] = "",
    limit: Annotated[int, typer.Option(min=2, help="Questions of each task.")] = 32,
    step: Annotated[
        int,
        typer.Option(
            min=1,
            help="Layers between the starts of left-out and repeated blocks; a later scan with fewer adds blocks.",
        ),
    ] = 1,
    out: Annotated[Path | None, typer.Option(help="Folder of the results; runs/CONFIG-scan by default.")] = None,
    backend: options.Backend = None,
    workers: options.Workers = None,
    task_search_path: options.TaskFolders = None,
    changes: options.Changes = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """Measure what leaving out, repeating and swapping each block of layers does to your tasks.

    The same command goes on after a stop. It writes scan.jsonl, the page scan.html, and best.yml, a recipe.
    """
    settings = options.read_settings(
        config, task_search_path, changes, engine__backend=backend, engine__workers=workers
    )
    root = config.parent.absolute()
    check_start(settings, root)
    from llmevo.reports.html.scan import scan_page  # torch and plotly take seconds to import
    from llmevo.reports.terminal.scan import Progress, show
    from llmevo.run.scan import Scan

    folder = out or Path("runs") / f"{config.stem}-scan"
    found = Scan(settings, root, folder, of, limit, step, warned)
    found.run(Progress(terminal.failures if as_json else terminal.console).watch)
    page = folder / "scan.html"
    try:
        page.write_text(scan_page(found, config.stem))
        recipe = found.write_recipe(found.best[0]) if found.best else None
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); name another folder with --out") from error
    if as_json:
        terminal.console.print(json.dumps([vars(row) for row in found.rows]), soft_wrap=True, highlight=False)
        return
    show(found, terminal.console)
    terminal.console.print(f"{page} has the heat map.", soft_wrap=True, highlight=False)
    if recipe:
        terminal.console.print(f"`llmevo merge {recipe} OUT` writes the best edit.", soft_wrap=True, highlight=False)
