"""`llmevo merge`."""

from pathlib import Path
from typing import Annotated

import typer

from llmevo.cli import terminal
from llmevo.cli.options import As, DonorFile, Energy, Parameters, Ranks
from llmevo.cli.written import print_written


def merge(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yml", help="A mergekit recipe.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of random masks; by default that of the recipe, or 0.")
    ] = None,
    as_: As = None,
    rank: Ranks = None,
    energy: Energy = None,
    parameters: Parameters = None,
    donor: DonorFile = None,
) -> None:
    """Merge a mergekit recipe into a new model."""
    from llmevo.export.formats import Format  # torch takes seconds to import
    from llmevo.export.merge import merge_as
    from llmevo.models.tokenizer import TOKENIZERS

    warnings: list[str] = []
    format_ = Format.of(as_, rank, energy, parameters, donor)
    said: list[str] = []
    with terminal.console.status("Merging and writing…"):
        merged, written = merge_as(recipe, out, format_, seed=seed, warn=warnings.append, say=said.append)
    print_written(written)
    for line in said:
        terminal.console.print(line, highlight=False)
    for warning in warnings:
        terminal.console.print(warning, style="yellow")
    if format_.kind in ("model", "fp8") and not any((out / name).exists() for name in (*TOKENIZERS, "tekken.json")):
        terminal.console.print(
            f"It has no tokenizer, as {merged.tokenizer_donor} has none: copy the tokenizer's files into {out}.",
            style="yellow",
        )
