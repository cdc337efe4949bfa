"""`llmevo export`."""

from pathlib import Path
from typing import Annotated

import typer

from llmevo.cli import terminal
from llmevo.cli.live import warned
from llmevo.cli.options import RunFolder
from llmevo.errors import LlmevoError
from llmevo.export.runs import open_run


def export(
    run: RunFolder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    candidate: Annotated[int | None, typer.Option(help="Id of a candidate; the best by default.")] = None,
    recipe_only: Annotated[
        bool, typer.Option("--recipe-only", help="Write recipe, card, config and log to share, without weights.")
    ] = False,
    push: Annotated[
        str | None, typer.Option(metavar="REPO", help="Upload to the Hugging Face hub: OWNER/NAME.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Export although a model has changed; the card says so.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a new REPO private.")] = False,
) -> None:
    """Write the merged model as a Hugging Face folder, or the recipe that makes it."""
    from llmevo.export import hub  # the hub's client takes seconds to import

    opened = open_run(run)
    exported = opened.prepare_export(out, candidate, recipe_only, force, warned)
    if violated := opened.state.trials[exported.candidate].reason:
        terminal.console.print(f"Candidate {exported.candidate}: {violated}", style="yellow")
    address = hub.create(push, private) if push else ""
    if recipe_only:
        exported.write_recipe(out)
        done = f"{out} has the recipe and its origin; `llmevo merge {out}/best.yml MODEL` makes the model"
    else:
        with terminal.console.status("Merging and writing…"):
            exported.write(opened.experiment.sources, out)
        done = f"{out} is a Hugging Face model: AutoModelForCausalLM.from_pretrained({str(out)!r})"
    terminal.console.print(done, soft_wrap=True)
    if exported.shared.local and (recipe_only or push):
        terminal.console.print(
            f"Only this machine has {', '.join(exported.shared.local)}: publish them and replace these references in"
            f" {out}/best.yml by their hub ids; README.md says so too.",
            style="yellow",
            soft_wrap=True,
        )
    if push:
        try:
            with terminal.console.status("Uploading…"):
                hub.upload(out, push, f"Found by llmevo: candidate {exported.candidate} of {run.absolute().name}")
        except LlmevoError as error:
            raise type(error)(f"{error}; {out} is written") from error
        terminal.console.print(f"Uploaded to {address}", soft_wrap=True)
