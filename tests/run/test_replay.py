"""A run can be seen again, recomputed, scored again, and asked what another search would have found."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llmevo.errors import RunError
from llmevo.reports.terminal.replay import READABLE, play
from llmevo.run.experiment import config_of
from llmevo.run.log import events
from llmevo.run.log.events import EVENTS
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import LOG, read_log
from llmevo.run.scorer import Scorer
from llmevo.run.verify import verify
from support.workspace import Workspace

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("*.jsonl"))
KINDS = ("llm", "llm-off", "cma-es", "llm-evo-merge", "tpe", "spsa", "resumed", "failures")


def golden(name: str) -> Path:
    return Path(__file__).parents[1] / "golden" / f"{name}.jsonl"


def test_there_is_a_golden_log_of_every_kind() -> None:
    names = {file.stem for file in GOLDEN}
    assert names >= {f"0.1-{kind}" for kind in KINDS}
    states = {kind: RunState.fold(iter(read_log(golden(f"0.1-{kind}")))) for kind in KINDS}
    assert states["llm"].prompted
    assert states["llm-evo-merge"].prompted
    assert states["resumed"].resumed
    assert any(trial.score is None for trial in states["failures"].trials.values())
    assert all(state.finished for state in states.values())


def test_the_golden_log_of_an_llm_that_leads_holds_beliefs_hypotheses_moves_and_an_answer_of_no_use() -> None:
    state = RunState.fold(iter(read_log(golden("0.3-llm"))))
    replies = [event.reply or "" for event in state.prompted]
    assert state.started
    assert state.started.rules == 3
    for part in ('"beliefs": [{', '"hypotheses": [{', '"move": {', '"depth": {'):
        assert any(part in reply for reply in replies)
    assert any(event.reply and not event.used for event in state.prompted)
    assert any(candidate.origin == "llm" and not candidate.generation for candidate in state.candidates.values())


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_a_golden_log_verifies_for_ever(file: Path) -> None:
    assert verify(read_log(file), file)


@pytest.mark.parametrize("search", [{"optimizer": "one-plus-one"}, {"sigma_rule": "legacy"}], ids=str)
@pytest.mark.usefixtures("run")
def test_a_log_with_a_removed_value_is_shown_and_exported_and_no_more(
    workspace: Workspace, search: dict[str, str]
) -> None:
    log = workspace.root / "run" / LOG
    first, *others = log.read_text().splitlines(keepends=True)
    started = json.loads(first)
    started["config"]["search"] |= search
    log.write_text("".join([json.dumps(started) + "\n", *others]))
    for words in (("status", "run"), ("replay", "run"), ("report", "run"), ("export", "run", "merged")):
        status, printed = workspace.llmevo(*words)
        assert status == 0, printed
    for words in (("resume", "run"), ("replay", "run", "--verify")):
        status, printed = workspace.llmevo(*words)
        says = " ".join(printed.split())
        assert (status, "was removed, so this run can be shown and exported" in says) == (2, True), printed


def test_predicted_scores_are_logged_and_verified(workspace: Workspace) -> None:
    search = {"optimizer": "llm-off", "budget": 10}
    assert workspace.llmevo("run", workspace.config(search=search, heldout=None), "--out", "run")[0] == 0
    log = workspace.root / "run" / LOG
    rows = [row for event in read_log(log.parent) if isinstance(event, events.Asked) for row in event.candidates]
    predicted = [row["expected"] for row in rows if row["origin"] == "gaussian"]
    assert predicted == [float(row["note"].split()[1]) for row in rows if row["origin"] == "gaussian"]
    assert predicted
    log.write_text(log.read_text().replace(f'"expected":{predicted[0]}', '"expected":7.5', 1))
    status, printed = workspace.llmevo("replay", "run", "--verify")
    assert (status, ".expected is 7.5 in the log" in " ".join(printed.split())) == (2, True), printed


def test_verifying_needs_no_models_no_questions_and_no_library_that_scores() -> None:
    code = (
        "import sys; from llmevo.cli import app as cli; sys.argv = ['llmevo', 'replay', sys.argv[1], '--verify']\n"
        "try: cli.main()\n"
        "except SystemExit as left: assert not left.code, left.code\n"
        "assert not {'transformers', 'lm_eval', 'datasets', 'openai'} & {*sys.modules}"
    )
    command = [sys.executable, "-c", code, str(golden("0.1-llm"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ, cwd="/")
    assert done.returncode == 0, done.stderr
    assert "Verified" in done.stdout


def changed(file: Path, kind: str, place: int, **fields: Any) -> list[events.Event]:
    """A log with one event of a kind changed."""
    raw: list[Any] = [json.loads(line) for line in file.read_text().splitlines()]
    [event for event in raw if event["event"] == kind][place].update(fields)
    return [EVENTS.validate_python(line) for line in raw]


@pytest.mark.parametrize(
    ("kind", "place", "fields", "says"),
    [
        ("evaluated", 5, {"score": 0.77}, r"line \d+: evaluated\.score is 0\.77 in the log"),
        ("evaluated", 5, {"candidate": 1}, r"line \d+: evaluated\.candidate is 1 in the log and 5 recomputed"),
        ("evaluated", 5, {"candidate": 99}, "candidate 99, which was never asked for"),
        ("asked", 2, {"candidates": []}, r"line \d+: asked\.candidates"),
        ("told", 2, {"state": "other"}, r"line \d+: told\.state is 'other' in the log"),
        ("told", 2, {"sigma": 0.1234}, r"line \d+: told\.sigma"),
        ("heldout", 2, {"row": "base"}, r"line \d+: heldout\.row is 'base'"),
        ("heldout", 2, {"score": 0.99}, r"line \d+: heldout\.score"),
        ("run_finished", 0, {"best": 0}, r"line \d+: run_finished\.best is 0 in the log"),
    ],
)
def test_whatever_is_changed_in_a_log_is_found_and_named(
    kind: str, place: int, fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(RunError, match=says):
        verify(changed(golden("0.1-llm-off"), kind, place, **fields), golden("0.1-llm-off"))


def test_a_changed_reply_is_found(tmp_path: Path) -> None:
    log = read_log(golden("0.1-llm"))
    reply = next(event.reply for event in log if isinstance(event, events.Prompted) and event.used)
    assert reply
    answer = json.loads(reply)
    answer["proposals"] = [
        {**row, "genome": [[1] * len(line) for line in row["genome"]]} for row in answer["proposals"]
    ]
    with pytest.raises(RunError, match=r"asked\.candidates"):
        verify(changed(golden("0.1-llm"), "prompted", 0, reply=json.dumps(answer)), tmp_path)


def test_a_difference_names_the_versions_that_are_others() -> None:
    versions = {"numpy": "0.9", "python": "2.7"}
    log = changed(golden("0.1-cma-es"), "told", 1, sigma=0.5)
    log[0] = log[0].model_copy(update={"versions": versions})
    with pytest.raises(RunError, match=r"made with python 2\.7 \(here .*\), numpy 0\.9 \(here "):
        verify(log, golden("0.1-cma-es"))


def test_the_last_digits_of_a_step_size_are_the_processors() -> None:
    log = read_log(golden("0.1-cma-es"))
    told = next(event for event in log if isinstance(event, events.Told) and event.sigma and event.generation > 1)
    assert told.sigma
    log[log.index(told)] = told.model_copy(update={"sigma": told.sigma * (1 + 1e-9)})
    assert verify(log, golden("0.1-cma-es"))


def played(name: str, terminal: bool = False, **options: Any) -> tuple[str, list[float]]:
    """What a replay shows, and the pauses it makes."""
    waits: list[float] = []
    log = read_log(golden(name))
    state = RunState.fold(iter(log))
    assert state.started is not None
    console = Console(width=120, height=40, record=True, force_terminal=terminal, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    with console.file:
        play(console, log, config_of(state.started, name), Path(name), sleep=waits.append, **options)
    return console.export_text(), waits


def test_a_replay_elsewhere_prints_the_lines_at_once() -> None:
    text, waits = played("0.1-llm")
    assert not any(waits)
    for number in range(20):
        assert f"#{number} (" in text
    assert "held out: best" in text


def test_a_replay_in_a_terminal_shows_the_picture_event_by_event() -> None:
    text, waits = played("0.1-llm", terminal=True)
    assert waits == [READABLE] * len(read_log(golden("0.1-llm")))
    assert "best" in text


def test_a_speed_is_a_multiple_of_the_real_one() -> None:
    log = read_log(golden("0.1-cma-es"))
    whole = RunState.fold(iter(log)).seconds
    for speed in (1.0, 4.0):
        assert sum(played("0.1-cma-es", speed=speed)[1]) == pytest.approx(whole / speed)


def test_one_generation_is_shown_alone() -> None:
    text, _ = played("0.1-llm", generation=1)
    state = RunState.fold(iter(read_log(golden("0.1-llm"))))
    lines = text.splitlines()
    shown = {number for number in state.candidates if any(f"] #{number} (" in line for line in lines)}
    assert shown == {candidate.id for candidate in state.candidates.values() if candidate.generation == 1}
    with pytest.raises(RunError, match=r"no generation 77; it has 0 to \d"):
        played("0.1-llm", generation=77)


def test_a_generation_is_printed_alone_as_json(workspace: Workspace) -> None:
    log = GOLDEN[0].with_name("0.1-llm.jsonl")
    last = len(RunState.fold(iter(read_log(log))).told) - 1
    status, printed = workspace.llmevo("replay", log, "--json", "--generation", last)
    assert (status, json.loads(printed.splitlines()[-1])["event"]) == (0, "told")
    status, printed = workspace.llmevo("replay", log, "--json", "--generation", last + 1)
    assert (status, f"no generation {last + 1}" in printed) == (2, True), printed


def test_prompts_and_replies_are_shown_to_the_letter() -> None:
    text, _ = played("0.1-llm", prompts=True)
    event = next(event for event in read_log(golden("0.1-llm")) if isinstance(event, events.Prompted))
    for message in event.messages:
        assert message["content"].strip().splitlines()[0][:100] in text
    assert (event.reply or "")[:100] in text


@pytest.fixture
def run(workspace: Workspace) -> Path:
    search = {"optimizer": "random", "budget": 5, "seed": 3}
    workspace.finished(search=search, heldout=None)
    return workspace.root / "run"


def test_a_picture_that_cannot_be_written_is_named(workspace: Workspace) -> None:
    status, printed = workspace.llmevo("replay", golden("0.1-cma-es"), "--picture", "none/picture.svg")
    assert (status, "--picture: none/picture.svg cannot be written" in printed) == (2, True), printed


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--verify", "--rescore", 2), "--rescore 2: --verify does not use it; leave one of them out"),
        (("--verify", "--picture", "x.svg"), "--picture x.svg: --verify does not use it"),
        (("--picture", "x.svg", "--generation", 0), "--generation 0: --picture does not use it"),
        (("--json", "--speed", 2), "--speed 2.0: --json does not use it"),
        (("--rescore", 2, "--prompts"), "--prompts: --rescore does not use it"),
        (("--trust",), "--trust: give it with --verify or --rescore"),
    ],
)
def test_an_option_that_is_not_used_is_refused(workspace: Workspace, words: tuple[object, ...], says: str) -> None:
    status, printed = workspace.llmevo("replay", golden("0.1-cma-es"), *words)
    assert (status, says in printed, Path("x.svg").exists()) == (2, True, False), printed


def test_a_log_with_a_score_that_is_no_number_is_refused_with_its_line(workspace: Workspace) -> None:
    lines = golden("0.1-cma-es").read_text().splitlines(keepends=True)
    place = next(i for i, line in enumerate(lines) if '"evaluated"' in line)
    lines[place] = re.sub(r'"score":[-\d.e]+', '"score":NaN', lines[place])
    Path("edited").mkdir()
    Path("edited", LOG).write_text("".join(lines))
    for words in (("report",), ("replay",), ("replay", "--verify")):
        status, printed = workspace.llmevo(words[0], "edited", *words[1:])
        assert (status, f"{LOG}:{place + 1}: is no event of llmevo (NaN is no number" in printed) == (2, True), printed


def test_scored_again_the_best_have_the_scores_of_the_log(workspace: Workspace, run: Path) -> None:
    before = (run / LOG).read_bytes()
    status, printed = workspace.llmevo("replay", "run", "--rescore", 2)
    assert status == 0, printed
    assert printed.count("equal") == 2
    best = workspace.state("run").best
    assert best is not None
    assert f"#{best.candidate.id}" in printed
    assert (run / LOG).read_bytes() == before


@pytest.mark.usefixtures("run")
def test_a_score_that_is_another_now_fails_and_says_what_has_changed(workspace: Workspace) -> None:
    from support.tiny_model import save_tiny

    save_tiny(workspace.root / "two", 9, tied=True)
    status, printed = workspace.llmevo("replay", "run", "--rescore", 5)
    assert status == 1, printed
    assert "differs in" in printed
    assert "sources.two.checksum" in printed


@pytest.mark.usefixtures("run")
def test_other_answers_to_the_same_questions_explain_another_score(workspace: Workspace) -> None:
    file = workspace.root / "tasks" / "letters.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**row, "answer": (row["answer"] + 1) % 4}) + "\n" for row in rows))
    status, printed = workspace.llmevo("replay", "run", "--rescore", 1)
    assert status == 1, printed
    assert "questions.search.answers: {'letters: Q: abc A:': ' a'" in printed


@pytest.mark.usefixtures("run")
def test_a_candidate_that_fails_now_is_a_difference(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmevo.errors import CandidateError

    def fail(*_: object, **__: object) -> None:
        raise CandidateError("out of memory")

    monkeypatch.setattr(Scorer, "score", fail)
    status, printed = workspace.llmevo("replay", "run", "--rescore", 1)
    assert (status, "out of memory" in printed, "neither the questions nor the models" in printed) == (1, True, True)
