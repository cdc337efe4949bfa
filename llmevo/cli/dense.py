"""`llmevo dense`."""

from pathlib import Path
from typing import Annotated

import typer

from llmevo.cli import terminal
from llmevo.errors import plural


def dense(
    mixture: Annotated[str, typer.Argument(metavar="MIXTURE", help="A mixture of experts: a folder or a hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    by: Annotated[
        str,
        typer.Option(
            help="average: the experts by what the routers use; widen: the most used with all of their neurons;"
            " uniform: the plain average; expert: one of them."
        ),
    ] = "average",
    text: Annotated[
        Path | None,
        typer.Option(
            help="With --by average or widen: texts on which the routers' use is measured: a text a line, JSON Lines"
            ' with "text", or JSON {task: [text, …]}.'
        ),
    ] = None,
    experts: Annotated[int | None, typer.Option(help="With --by widen: experts a layer; 2 by default.")] = None,
    expert: Annotated[
        int | None, typer.Option(help="With --by expert: its number, from 0; the first by default.")
    ] = None,
) -> None:
    """Make one dense model of a mixture of experts (Mixtral or Qwen3-MoE)."""
    from llmevo.export.dense import WAYS, Way, make_dense  # torch takes seconds to import

    ways: dict[str, Way] = {known: known for known in WAYS}
    if by not in ways:
        raise typer.BadParameter(f"{by!r} is none of {', '.join(WAYS)}", param_hint="--by")
    with terminal.console.status("Making a dense model…"):
        _, use = make_dense(
            mixture, out, ways[by], text=text, experts=experts, expert=expert, say=terminal.console.print
        )
    if use:
        terminal.console.print(
            f"The routers' use of {plural(len(use.mean[0]), 'expert')}, by {use.tokens} tokens of"
            f" {plural(use.texts, 'text')} in {use.seconds:.0f} s; layers 0, 1, …:",
            soft_wrap=True,
        )
        for place in range(len(use.mean[0])):
            terminal.console.print(f"  expert {place}: " + " ".join(f"{row[place]:.2f}" for row in use.mean))
    terminal.console.print(
        f"{out} is a dense Hugging Face model; {out / 'mergekit_config.yml'} is its recipe for llmevo merge.",
        soft_wrap=True,
    )
