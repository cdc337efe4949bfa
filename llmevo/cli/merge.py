"""`llmevo merge`."""

from pathlib import Path
from typing import Annotated

import typer

from llmevo.cli import terminal
from llmevo.errors import UserError
from llmevo.merging.recipe import Provenance, Recipe, dead_filters


def merge(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yml", help="A mergekit recipe.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Of random masks; by default as the recipe says, or 0.", show_default=False),
    ] = None,
) -> None:
    """Carry out a mergekit recipe. Methods: the ones llmevo searches over."""
    from llmevo.export.pack import root_of
    from llmevo.merging.merger import Seed, read_masks  # torch takes seconds to import
    from llmevo.merging.writer import write_model
    from llmevo.models.checkpoints import Sources
    from llmevo.models.tokenizer import TOKENIZERS

    try:
        text = recipe.read_text()
        parsed, found = Recipe.from_yaml(text, str(recipe)), Provenance.of(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{recipe}: cannot be read ({error})") from error
    masks: Seed = seed or 0
    if found and seed is None:
        masks = read_masks(recipe.parent / found.masks, parsed) if found.masks else found.seed
    with terminal.console.status("Merging and writing…"):
        sources = Sources.open(parsed.references, root_of(recipe.parent))
        dead = dead_filters(parsed, [*sources[parsed.donor].shapes], sources.depth(parsed.donor))
        write_model(parsed, sources, out, masks, trim=found is None)
    terminal.console.print(f"{out} is a Hugging Face model.", highlight=False)
    if dead:
        terminal.console.print(
            f"These filters of {recipe} match no tensor, so their values are not used: {'; '.join(dead)}.",
            style="yellow",
            highlight=False,
        )
    if not any((out / name).exists() for name in TOKENIZERS):
        terminal.console.print(
            f"It has no tokenizer, as {parsed.tokenizer_donor} has none: copy the tokenizer's files into {out}.",
            style="yellow",
            highlight=False,
        )
