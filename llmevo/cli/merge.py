"""`llmevo merge`."""

from pathlib import Path
from typing import Annotated

import typer

from llmevo.cli import terminal


def merge(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yml", help="A mergekit recipe.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of random masks; by default that of the recipe, or 0.")
    ] = None,
) -> None:
    """Merge a mergekit recipe into a new model. Methods: those that llmevo searches over."""
    from llmevo.export.merge import merge as merge_recipe
    from llmevo.models.tokenizer import TOKENIZERS  # torch takes seconds to import

    warnings: list[str] = []
    said: list[str] = []
    with terminal.console.status("Merging and writing…"):
        merged = merge_recipe(recipe, out, seed=seed, warn=warnings.append, say=said.append)
    for line in (f"{out} is a Hugging Face model.", *said):
        terminal.console.print(line, highlight=False)
    for warning in warnings:
        terminal.console.print(warning, style="yellow")
    if not any((out / name).exists() for name in TOKENIZERS):
        terminal.console.print(
            f"It has no tokenizer, as {merged.tokenizer_donor} has none: copy the tokenizer's files into {out}.",
            style="yellow",
        )
