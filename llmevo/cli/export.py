"""`llmevo export`."""

from pathlib import Path
from typing import Annotated

import typer

from llmevo.cli import terminal
from llmevo.cli.live import warned
from llmevo.cli.options import As, DonorFile, Energy, Parameters, Ranks, RunFolder, Trust
from llmevo.cli.written import print_written
from llmevo.errors import LlmevoError, UserError
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
    trust: Trust = False,
    as_: As = None,
    rank: Ranks = None,
    energy: Energy = None,
    parameters: Parameters = None,
    donor: DonorFile = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new REPO private.")] = False,
) -> None:
    """Write the merged model as a Hugging Face folder, an adapter or a GGUF file, or the recipe that makes it."""
    from llmevo.export import hub  # the hub's client and torch take seconds to import
    from llmevo.export.formats import Format

    format_ = Format.of(as_, rank, energy, parameters, donor)
    if recipe_only and format_.kind != "model":
        raise UserError(f"--as {as_} and --recipe-only: a recipe has no weights in a format; leave one out")
    if push and out.suffix == ".gguf":
        raise UserError(f"--push {push}: {out} is a file; give a folder, which gets the GGUF file and its card")
    if push and format_.kind == "experts":
        raise UserError(f"--push {push}: prepared experts are for mergekit on this machine; leave --push out")
    if private and not push:
        raise UserError("--private: nothing is published; name the repository with --push, or leave it out")
    opened = open_run(run)
    exported = opened.prepare_export(out, candidate, recipe_only, force, trust, warned)
    if violated := opened.state.trials[exported.candidate].reason:
        terminal.console.print(f"Candidate {exported.candidate}: {violated}", style="yellow")
    address = hub.create(push, private) if push else ""
    if recipe_only:
        exported.write_recipe(out)
        needed = [f"its models, where local paths start at {out}"] if exported.shared.local else []
        prepare = exported.recipe.prepare
        if prepare and prepare.text:
            needed += [f"{prepare.text}, which holds the texts of its preparation and is not published"]
        given = f" from {' and '.join(needed)}" if needed else ""
        done = f"{out} has the recipe and its origin; `llmevo merge {out}/best.yml MODEL` makes the model{given}"
        terminal.console.print(done, soft_wrap=True)
    else:
        with terminal.console.status("Merging and writing…"):
            written = exported.write(opened.experiment.sources, out, format_, to_share=bool(push))
        print_written(written)
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
