"""What a person reads of a run."""

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from llmevo.cli.terminal import Terminal
from llmevo.config import parse_config
from llmevo.errors import plural
from llmevo.evaluation.tasks.task import short
from llmevo.reports.conclusion import conclusion
from llmevo.reports.terminal.live import Display
from llmevo.reports.terminal.panel import fitted, heldout, picture
from llmevo.reports.terminal.replay import play
from llmevo.reports.text import clock
from llmevo.run.experiment import Experiment
from llmevo.run.log.events import Asked, Event, Failed, HeldOut, Prompted
from llmevo.run.log.state import RunState
from llmevo.run.progress import ECONOMY, seconds_left
from support.made_logs import (
    asked,
    evaluated,
    failed,
    finished,
    folded,
    held_out,
    prompted,
    started,
    told,
    unscored,
    whole_run,
    written,
)
from support.workspace import Workspace, write_task


def state_of(*rows: HeldOut) -> RunState:
    return RunState(heldout={row.row: row for row in rows})


def test_groups_are_compared_question_by_question() -> None:
    answers = {"a": [1.0] * 50 + [0.0] * 50, "best": [1.0] * 55 + [0.0] * 45}
    rows = {
        name: held_out(name, "best" if name == "best" else "parent", sum(right) / 100, 0.05).model_copy(
            update={"item_scores": {"one": right, "two": right}}
        )
        for name, right in answers.items()
    }
    before = started(heldout=[{"name": "both"}])  # a log that does not say which tasks the group has
    groups = {"heldout": {"both": {"one": 0.5, "two": 0.5}}}
    others = {"heldout": {"one": [*range(100)], "two": [*range(100, 200)]}}
    same = {"heldout": {"one": [*range(100)], "two": [*range(100)]}}
    logs = [before, *(before.model_copy(update={"groups": groups, "clusters": of}) for of in (others, same))]
    said = [conclusion(RunState(log, heldout=rows))[0] for log in logs]
    assert all("+0.050" in line for line in said)
    unpaired, once, twice = (float(line.split("± ")[1].split()[0]) for line in said)
    assert unpaired == pytest.approx(0.071, abs=1e-3)
    assert once == pytest.approx(0.016, abs=2e-3)
    assert twice == pytest.approx(once * 2**0.5, rel=0.1)


def test_a_merge_that_does_not_beat_the_best_parent_is_not_sold() -> None:
    lines = conclusion(
        state_of(held_out("a", "parent", 0.6), held_out("uniform", "uniform", 0.4), held_out("best", "best", 0.55))
    )
    assert "-0.050" in lines[0]
    assert lines[1:] == [
        "The best merge does not beat a.",
        "a is the simpler choice. Chosen by its held-out score, that score is no longer unbiased.",
    ]
    apart = conclusion(state_of(held_out("a", "parent", 0.6, 0.03), held_out("best", "best", 0.57, 0.03)))[1]
    assert apart == "The best merge does not beat a, and within two standard errors the two cannot be told apart."


def test_a_merge_that_does_not_beat_the_best_coefficient_is_not_sold() -> None:
    rows = [held_out("a", "parent", 0.3), held_out("uniform", "uniform", 0.4)]
    coefficient = held_out("coefficient 0.5", "coefficient", 0.62)
    lines = conclusion(state_of(*rows, coefficient, held_out("best", "best", 0.6)))
    assert "-0.020" in lines[0]
    assert "against coefficient 0.5, the best of parents, uniform and coefficients" in lines[0]
    assert lines[1].startswith("The best merge does not beat coefficient 0.5")
    assert "+0.020" in conclusion(state_of(*rows, coefficient, held_out("best", "best", 0.64)))[0]


def test_a_verdict_against_a_merge_names_the_command_that_writes_the_better_one() -> None:
    better = held_out("a", "parent", 0.6).model_copy(update={"candidate": 2})
    lines = conclusion(state_of(better, held_out("best", "best", 0.55)), Path("runs/x"))
    assert lines[2].startswith("a is the simpler choice: `llmevo export runs/x OUT --candidate 2`. ")


def test_a_start_row_that_is_handed_over_is_named_with_the_same_advice() -> None:
    start = asked(0, [0, 1], "parent", ("one", "two"))
    better = held_out("two", "parent", 0.6).model_copy(update={"candidate": 1})
    rows = [held_out("one", "parent", 0.5), better, held_out("best", "best", 0.5).model_copy(update={"candidate": 0})]
    lines = conclusion(folded([started(), start, evaluated(0, 0.7), evaluated(1, 0.6), told(0), *rows]), Path("run"))
    assert lines == [
        "No merge that the search found is better than the start row one, which is the run's result. On the"
        " held-out questions one scores -0.100 ± 0.014 against two, the best of parents and uniform.",
        "one does not beat two.",
        "two is the simpler choice: `llmevo export run OUT --candidate 1`. Chosen by its held-out score, that score is"
        " no longer unbiased.",
    ]


def test_a_gain_within_the_noise_is_called_luck() -> None:
    lines = conclusion(state_of(held_out("a", "parent", 0.6, 0.03), held_out("best", "best", 0.63, 0.03)))
    assert "may be luck" in lines[1]


def test_a_clear_gain_stands_alone() -> None:
    assert len(conclusion(state_of(held_out("a", "parent", 0.4), held_out("best", "best", 0.6)))) == 1


def test_a_best_that_failed_on_the_held_out_questions_is_said_to() -> None:
    state = folded([*whole_run()[:-2], unscored("best", "best", "the metric is inf")])
    assert conclusion(state) == ["The best merge has no held-out score, for it failed: the metric is inf."]


def test_nothing_is_said_of_a_gain_where_no_other_row_has_a_score() -> None:
    lines = conclusion(
        folded([held_out("base", "base", 0.6), held_out("best", "best", 0.7), unscored("one", "parent")])
    )
    assert lines == ["No parent and no uniform merge has a held-out score to compare the best merge with."]


def test_answers_to_the_same_held_out_questions_are_no_further_evidence(workspace: Workspace) -> None:
    write_task(workspace.root, "again_heldout", 1)  # the questions of letters_heldout
    given = workspace.config(heldout=["letters_heldout", "again_heldout"])
    status, printed = workspace.llmevo("run", given, "--out", "run")
    assert status == 0, printed
    assert "24 answers to 12 held-out questions" in printed
    best = workspace.state("run").heldout["best"]
    assert best.stderr == pytest.approx(2 * best.tasks["letters_heldout"]["acc_stderr,none"], rel=0.1)
    assert workspace.llmevo("report", "run")[0] == 0
    assert "24 answers to 12 questions" in (workspace.root / "run" / "report.html").read_text()


def test_task_names_lose_what_they_share() -> None:
    assert short(["q_words_heldout", "q_family_tree_heldout"]) == ["words", "family_tree"]
    assert short(["arc", "arc_easy"]) == ["arc", "arc_easy"]
    assert short(["only_one"]) == ["only_one"]


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (61.6, "1:02"), (3_725, "1:02:05")])
def test_times_read_as_people_write_them(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_the_picture_shows_progress_scores_the_last_answer_and_the_held_out_table(workspace: Workspace) -> None:
    workspace.finished("--budget", 24)
    state = workspace.state("run")
    config = Experiment.of_log(state.started, Path("run")).config
    console = Terminal(width=140, file=io.StringIO(), record=True)
    console.print(Display(console, config, Path("run")).picture(state))
    text = console.export_text()
    for words in ("24 of 24", "best so far", "uniform", "proposals in", "held-out questions", "LLM trust"):
        assert words in text


def test_scores_of_held_out_tasks_have_their_errors_where_all_have_room(workspace: Workspace) -> None:
    workspace.finished("--budget", 24)
    row, tasks = r"^base +\d\.\d{3} ± \d\.\d{3}", len(workspace.state("run").heldout_tasks)
    for width, cell in ((140, r"\d\.\d{3} ± \d\.\d{3}"), (46, r"\d\.\d{3}")):
        console = Console(width=width, file=io.StringIO(), record=True)
        console.print(heldout(workspace.state("run"), width))
        text = console.export_text()
        assert re.search(rf"{row}( +{cell}){{{tasks}}} *$", text, re.M), text


def left_of(log: list[Event]) -> float:
    state = folded(log)
    assert state.started
    return seconds_left(state, parse_config(state.started.config, "test"))


def drawn(log: list[Event], width: int, height: int | None, folder: str = "runs/quickstart") -> list[str]:
    """The picture as lines of text."""
    state = folded(log)
    assert state.started is not None
    console = Console(width=width, height=height or 200, file=io.StringIO(), record=True)
    config = parse_config(state.started.config, "test")
    console.print(Display(console, config, Path(folder)).picture(state, height))
    return console.export_text().splitlines()


ATTACK = "\x1b]52;c;cm0gLXJmIH4=\x07\x1b[2J\x9b31m\u202ered\r[/bold] [link=http://evil.example]:skull:"
"""Sets the clipboard, clears the screen, changes the colour and the direction, and is broken markup."""


@pytest.mark.parametrize("terminal", [True, False])
def test_what_others_wrote_controls_no_terminal(tmp_path: Path, terminal: bool) -> None:
    log = [*whole_run()]
    for place, event in enumerate(log):
        if isinstance(event, Prompted):
            message = {"role": ATTACK, "content": ATTACK}
            said = {"model": ATTACK, "analysis": ATTACK, "problems": [ATTACK], "messages": [message], "reply": ATTACK}
            log[place] = event.model_copy(update=said)
        elif isinstance(event, Asked):
            rows = [{**row, "note": ATTACK, "origin": ATTACK} for row in event.candidates]
            log[place] = event.model_copy(update={"candidates": rows})
        elif isinstance(event, Failed):
            log[place] = event.model_copy(update={"reason": ATTACK})
        elif isinstance(event, HeldOut) and event.kind == "parent":
            log[place] = event.model_copy(update={"row": f"{event.row} {ATTACK}"})
    screen = io.StringIO()
    console = Terminal(width=200, height=60, file=screen, force_terminal=terminal)
    config = parse_config(folded(log).started.config, "test")  # pyright: ignore[reportOptionalMemberAccess]
    play(console, log, config, tmp_path, prompts=True, sleep=lambda _: None)
    shown = screen.getvalue()
    assert "[/bold] [link=http://evil.example]:skull:" in shown
    for control in ("\x1b]", "\x1b[2J", "\x07", "\x9b", "\u202e", *([] if terminal else ["\x1b", "\r"])):
        assert control not in shown, repr(control)


def hard_run() -> list[Event]:
    """Everything that makes a picture grow: many models and tasks, long names, long thoughts, failures."""
    tasks = tuple(f"{'very_' * place}long_task_{place}" for place in range(9))
    names = tuple(f"a-model-with-a-rather-long-name-{place}" for place in range(12))
    log: list[Event] = [started(50, tasks), asked(0, [*range(12)], "parent", names)]
    log += [evaluated(place, place / 20, tasks) for place in range(12)]
    log += [told(0), prompted(1, "模型 should have more of it. " * 40, ("only [3 of 4] " * 20,))]
    log += [asked(1, [12, 13, 14], "llm", ("because " * 30,)), evaluated(12, 0.9, tasks), failed(13, "NaN " * 99)]
    return [*log, told(1)]


@pytest.mark.parametrize("width", [60, 80, 118])
@pytest.mark.parametrize("height", [20, 24, 50])
@pytest.mark.parametrize(("held", "lost"), [(0, 0), (12, 0), (12, 1), (6, 6), (1, 12)])
@pytest.mark.parametrize("make", [whole_run, hard_run])
def test_the_picture_fits_the_terminal(
    make: Callable[[], list[Event]], held: int, lost: int, height: int, width: int
) -> None:
    tasks = tuple(folded(make()).started.config["tasks"][i]["name"] for i in range(2))  # pyright: ignore
    log = [event for event in make() if event.event not in ("heldout", "run_finished")]
    log += [held_out(f"a-model-with-a-rather-long-name-{i}", "parent", 0.4, tasks=tasks) for i in range(held)]
    log += [unscored(f"a-lost-model-with-a-long-name-{i}", "parent", "NaN " * 99) for i in range(lost)]
    lines = drawn(log, width, height, "runs/" + "a-long-name-" * 12)
    assert len(lines) < height
    assert {cell_len(line) for line in lines} == {width}
    assert lines[0].startswith("╭─ llmevo")
    assert lines[-1] == "╰" + "─" * (width - 2) + "╯"


@pytest.mark.parametrize("width", [80, 118])
def test_the_picture_shows_where_a_run_stands(width: int) -> None:
    log = whole_run()[:12]
    text = "\n".join(drawn([*log, asked(2, [6])], width, 24))
    for words in (
        "6 of 9 evaluations",
        "left",
        "best so far 0.800 ± 0.050, +0.400 against uniform: #4 from llm",
        "step size 0.210",
        "LLM trust 0.40",
        "1 failed",
        "now #6 gaussian",
        "“Words want more of two.”",
        "some-llm gave 2 proposals",
        "words",
        "family",
    ):
        assert words in text, words
    assert re.search(r"one +0 +0\.300 ± 0\.050 +0\.300 +0\.300", text)
    assert re.search(r"latest +5 +failed", text)


def test_a_held_out_row_that_failed_is_in_the_picture_and_its_reason_below_it(tmp_path: Path) -> None:
    log = [*whole_run()[:-1], unscored("base", "base", "the metric is inf"), whole_run()[-1]]
    assert re.search(r"base +failed", "\n".join(drawn(log, 80, 24)))
    console = Terminal(width=120, file=io.StringIO(), record=True)
    config = parse_config(folded(log).started.config, "test")  # pyright: ignore[reportOptionalMemberAccess]
    play(console, log, config, tmp_path, sleep=lambda _: None)
    assert console.export_text().count("held-out row base failed: the metric is inf") == 2  # as a line, and in the end


def test_what_has_no_room_is_counted_and_the_strongest_stay() -> None:
    text = "\n".join(drawn(hard_run(), 80, 24))
    assert re.search(r"and \d+ weaker models and \d tasks more", text)
    ids = [int(found[1]) for found in re.finditer(r"a-model-with-a-ra… +(\d+) ", text)]
    assert ids == [*range(ids[0], 12)]
    assert "weaker" not in "\n".join(drawn(hard_run(), 80, None))


def test_names_that_are_cut_stay_different() -> None:
    names = {"a": "arithmetic", "b": "arithmetic_generate", "c": "words"}
    assert fitted(names, None) == names
    assert fitted(names, 25) == {"a": "arithm…", "b": "…nerate", "c": "words"}
    assert [*fitted(names, 2 * 8)] == ["a", "b"]


def test_other_budgets_show_their_own_progress() -> None:
    log = [started({"items": 100, "minutes": 2}), *whole_run()[1:9]]
    text = "\n".join(drawn(log, 80, 24))
    assert "40 of 100 items, 0.225 of 2 min" in text
    # 6 candidates of 10 questions to go, in 3 s each, 4 of them in two generations that the LLM is asked for; 4 rows.
    row = 1 + 20 * 0.2 * (2 / 20) ** ECONOMY
    assert left_of(log) == pytest.approx(6 * 3 + 2 * 1.5 + 4 * row)


def test_time_goes_on_between_events_in_a_live_picture_only() -> None:
    log = whole_run()[:12]
    last = datetime.now(UTC) - timedelta(minutes=70)
    log[0] = log[0].model_copy(update={"time": (last - timedelta(minutes=1)).isoformat()})
    log[-1] = log[-1].model_copy(update={"time": last.isoformat()})
    console, state = Console(width=80, file=io.StringIO(), record=True), folded(log)
    config = parse_config(log[0].model_dump()["config"], "test")
    for live, words in ((False, "1:00 so far"), (True, "1:11:0")):
        console.print(picture(state, config, Path("run"), 80, 24, live))
        assert words in console.export_text()


@pytest.mark.parametrize(("answered", "limit"), [(True, "10:15"), (False, "2:00")])
def test_a_wait_for_the_llm_is_shown_with_its_time_out_and_takes_nothing_from_what_comes_after_it(
    answered: bool, limit: str
) -> None:
    log = whole_run()[:12]
    log[0] = started(9).model_copy(update={"proposer": "openai"})
    log[6] = prompted(1).model_copy(update={} if answered else {"reply": None, "used": 0})
    console, state = Console(width=100, file=io.StringIO(), record=True), folded(log)
    config = parse_config(log[0].model_dump()["config"], "test")
    begun = datetime.now(UTC) - timedelta(seconds=83)
    state.latest = begun
    console.print(picture(state, config, Path("run"), 100, 24, live=True))
    text = console.export_text()
    assert re.search(rf"waiting for some-llm for 1:2\d, time-out after {limit}", text)
    # Three candidates and four rows are still to come, however long the answer takes.
    assert f"{clock(3 * 7 / 3 + 4 * (1 + 20 * 0.2 * (2 / 20) ** ECONOMY))} left" in text
    state.latest = None  # it has gone on just now: the pause before that is no wait
    console.print(picture(state, config, Path("run"), 100, 24, live=True, begun=datetime.now(UTC)))
    assert "waiting" not in console.export_text()


def test_where_there_is_no_terminal_nothing_is_wrapped_or_cut(tmp_path: Path) -> None:
    log = hard_run()
    tasks = tuple(task["name"] for task in log[0].model_dump()["config"]["tasks"])
    name = "a-model-with-a-rather-long-name-3"
    rows = [held_out(name, "parent", 0.4, tasks=tasks), held_out("best", "best", 0.7, tasks=tasks)]
    written(tmp_path / "run", [*log, *rows, finished(12, 0.9)])
    start = "from llmevo.cli.app import main; main()"
    command = [sys.executable, "-c", start, "replay", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "80"})
    assert "…" not in done.stdout
    table = next(line for line in done.stdout.splitlines() if line.startswith(name))
    assert len(table.split()) == 4 + len(tasks)
    assert all(task in done.stdout for task in short([*tasks]))


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 questions"), (1, "1 question"), (2, "2 questions"), (1200, "1,200 questions")]
)
def test_one_thing_is_not_said_in_the_plural(count: int, words: str) -> None:
    assert plural(count, "question") == words


def test_one_reply_is_not_many_replies() -> None:
    assert [plural(count, "reply", "replies") for count in (1, 2)] == ["1 reply", "2 replies"]


def test_lines_about_one_proposal_and_one_evaluation_say_so() -> None:
    state, event = folded(whole_run()), prompted(1).model_copy(update={"used": 1})
    console = Console(file=io.StringIO())
    config = parse_config(started(1).config, "test")
    assert "gave 1 proposal in" in (Display(console, config, Path("run")).line(event, state) or "")
    assert str(config.search.budget) == "1 evaluation"


def test_the_generation_shown_is_that_of_the_log() -> None:
    state = folded(whole_run())
    console = Console(width=100, file=io.StringIO(), force_terminal=True)
    with console.capture() as shown:
        console.print(picture(state, parse_config(state.started.config if state.started else {}, ""), Path("run"), 100))
    assert state.told[-1].generation == 2
    assert "generation 2," in shown.get()


def test_time_left_is_none_in_the_end_and_some_before() -> None:
    log = whole_run()
    left = [left_of(log[: place + 1]) for place in range(len(log))]
    assert left[5] > left[10] > 0
    assert left[-1] == 0


def test_a_replay_prints_the_lines_of_the_run_and_saves_its_picture(workspace: Workspace) -> None:
    live = workspace.finished()
    status, again = workspace.llmevo("replay", "run")
    assert status == 0
    assert [line for line in live.splitlines() if line.startswith("  [")] == [
        line for line in again.splitlines() if line.startswith("  [")
    ]
    assert workspace.llmevo("replay", "run", "--picture", "run.svg") == (0, "run.svg written.\n")
    assert Path("run.svg").read_text().startswith("<svg")


def test_a_terminal_gets_a_live_picture_instead_of_lines(workspace: Workspace) -> None:
    screen = io.StringIO()
    console = Console(width=140, file=screen, force_terminal=True)
    workspace.finished()
    config = Experiment.of_log(workspace.state("run").started, Path("run")).config
    state = RunState()
    with Display(console, config, Path("run")) as view:
        for event in workspace.events("run"):
            state.apply(event)
            view.show(event, state)
    assert "best so far" in screen.getvalue()
    assert "  [1/9]" not in screen.getvalue()
