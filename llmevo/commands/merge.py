"""`llmevo merge`."""

from pathlib import Path
from typing import Annotated

import typer

from llmevo import terminal
from llmevo.errors import UserError
from llmevo.recipe import Recipe
from llmevo.sources import Sources
from llmevo.writing import write_model


def merge(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yml", help="A mergekit recipe.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    seed: Annotated[int, typer.Option(help="Of random masks.")] = 0,
) -> None:
    """Carry out a mergekit recipe. Methods: the ones llmevo searches over."""
    try:
        parsed = Recipe.from_yaml(recipe.read_text(), str(recipe))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{recipe}: cannot be read ({error})") from error
    with terminal.console.status("Merging and writing…"):
        write_model(parsed, Sources.open(parsed.references, recipe.parent), out, seed)
    terminal.console.print(f"{out} is a Hugging Face model.", highlight=False)
