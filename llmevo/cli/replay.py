"""`llmevo replay`."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from llmevo.cli import terminal
from llmevo.cli.options import RunFolder, Trust, on_command_line, refuse_unused
from llmevo.errors import RunError, UserError
from llmevo.reports.terminal.live import Display
from llmevo.reports.terminal.replay import is_of_generation, no_generation, play, show_rescored
from llmevo.run import verify as verification
from llmevo.run.experiment import config_of
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import consistent_log, read_log

USED = {
    "--verify": ("--json", "--trust"),
    "--rescore": ("--json", "--trust"),
    "--picture": (),
    "--json": ("--generation",),
}
"""{what is done instead of showing the run: the options that it uses}; the first one that is given is done."""


def replay(
    context: typer.Context,
    run: RunFolder,
    speed: Annotated[
        float | None,
        typer.Option(help="Multiple of the real speed; by default ten events a second in a terminal."),
    ] = None,
    generation: Annotated[int | None, typer.Option(min=0, help="Show only this one; 0 for the start rows.")] = None,
    prompts: Annotated[bool, typer.Option("--prompts", help="Show the exact prompts and replies too.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Recompute the run from the log; fail on a difference.")
    ] = False,
    rescore: Annotated[int | None, typer.Option(min=1, help="Score the N best again; fail on a difference.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Save the final display as SVG.")] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print JSON: a line for each event, or the result of --verify or --rescore."),
    ] = False,
    trust: Trust = False,
) -> None:
    """Show a run again, from its log alone."""
    _refuse_unused(on_command_line(context))
    recorded = read_log(run)
    if verify:
        finished = verification.verify(recorded, run, trust)
        if as_json:
            print(json.dumps({"run": str(run), "verified": len(recorded), "finished": finished}))
            return
        if not finished:
            terminal.console.print("The run is unfinished; `llmevo resume` goes on with it.")
        terminal.console.print(
            f"Verified: {len(recorded)} events follow from the config, the LLM's replies and the scores."
        )
        return
    with consistent_log(run):
        state = RunState.fold(iter(recorded))
    if state.started is None:
        raise RunError(f"{run}: the log has no beginning; start the run anew")
    config = config_of(state.started, str(run))
    if rescore:
        scorer = verification.scorer_of(recorded, run, trust)
        rows = verification.rescore(recorded, scorer, rescore)
        if as_json:
            print(json.dumps([row.as_dict() for row in rows], indent=1))
        equal = show_rescored(terminal.failures if as_json else terminal.console, rows, state.started, scorer)
        if not equal:
            raise typer.Exit(1)
    elif picture:
        canvas = terminal.Terminal(record=True, width=118, file=io.StringIO(), force_terminal=True)
        with consistent_log(run):
            canvas.print(Display(canvas, config, run).picture(state))
        try:
            canvas.save_svg(str(picture), title="llmevo run")
        except OSError as error:
            raise UserError(f"--picture: {picture} cannot be written ({error.strerror}); name another file") from error
        terminal.console.print(f"{picture} written.", soft_wrap=True)
    elif as_json:
        grown, shown = RunState(), 0
        for event in recorded:
            if is_of_generation(event, grown, generation):
                print(event.model_dump_json(by_alias=True))
                shown += 1
            grown.apply(event)
        if generation is not None and not shown:
            raise no_generation(run, generation, state)
    else:
        if speed is not None and not speed > 0:
            raise typer.BadParameter("give a number above 0", param_hint="--speed")
        with consistent_log(run):
            play(terminal.console, recorded, config, run, speed, generation, prompts)


def _refuse_unused(given: Mapping[str, Any]) -> None:
    """Raise UserError for an option that what is done does not use."""
    done = next((option for option in USED if option in given), "")
    used = (done, *USED[done]) if done else ("--generation", "--speed", "--prompts")
    way = f"{done} does not use it; leave one of them out" if done else "give it with --verify or --rescore"
    refuse_unused(given, used, way)
