"""`llmevo serve`."""

import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from llmevo.cli import terminal
from llmevo.reports.text import say


def serve(
    place: Annotated[
        Path, typer.Argument(metavar="[RUN|FOLDER]", help="A run, or a folder that contains runs; ./runs by default.")
    ] = Path("runs"),
    host: Annotated[
        str, typer.Option(help="The address to listen at. With any but this machine's own, a token is needed.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen at; 0 for any free one.")] = 8420,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host", metavar="NAME", help="Another name of this machine in addresses; may be repeated."
        ),
    ] = None,
) -> None:
    """Show runs in a browser while they go on: the report, live, of one run or of all in a folder.

    It only reads. The address is printed, with a token where one is needed: LLMEVO_TOKEN, or else a new one.
    """
    from llmevo.reports.web.followed import Runs  # plotly is slow to import
    from llmevo.reports.web.server import Access, Server

    runs = Runs(place, lambda line: say(terminal.failures, line, "yellow"))
    access = Access.of(host, allow_host or ())
    server = Server(runs, host, port, access, runs.say)
    with suppress(OSError):
        os.nice(10)  # the run goes first
    try:
        with server.serving():
            say(terminal.console, f"{place} is shown at {server.url} (Ctrl-C ends it)")
            if access.is_open:
                note = "Everyone in the network who has this address can read it, and it is not encrypted."
                at = server.server_port
                say(
                    terminal.console,
                    f"! {note} An SSH tunnel needs no --host: ssh -L {at}:localhost:{at} HOST",
                    "yellow",
                )
            threading.Event().wait()
    except KeyboardInterrupt:
        terminal.say_stopped("No longer shown; the runs are left as they are.")
        raise typer.Exit(130) from None
