"""A run goes on after any stop, anywhere, and is then what it would have been."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmevo.config import read_config
from llmevo.errors import LogError, RunError
from llmevo.models.references import ModelReference
from llmevo.models.sources import Sources
from llmevo.run import loop
from llmevo.run.experiment import Experiment, config_of
from llmevo.run.log import changes, events
from llmevo.run.log.journal import Journal
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import LOG, RunLog, read_log
from llmevo.run.scorer import Scorer
from support import resumable
from support.made_logs import asked, evaluated, folded, started
from support.workspace import Workspace, write_task


def told(log: list[events.Event]) -> list[dict[str, Any]]:
    """What a log says, but for when and how long."""
    return [event.model_dump(mode="json", exclude={"time", "seconds"}) for event in log]


class Recorded:
    """An unbroken run, and the same one gone on with from a torn copy of its log."""

    def __init__(self, root: Path, models: Path, optimizer: str, budget: int) -> None:
        shutil.copytree(models, root, dirs_exist_ok=True)
        for shift, name in enumerate(("letters", "letters_heldout")):
            write_task(root, name, shift)
        self.scorer = resumable.CountedRig(resumable.config_in(root, optimizer, budget), root)
        self.folder = root / "again"
        self.scored, self.asked = resumable.carry_on(self.scorer, root / "whole")
        self.log = read_log(root / "whole")
        self.content = (root / "whole" / LOG).read_bytes()
        self.ends = [place + 1 for place, byte in enumerate(self.content) if byte == 10]

    def check(self, size: int) -> tuple[int, int]:
        """Go on after so many bytes of the log: nothing in it is done again, and the end is the same.

        How many evaluations and calls of the LLM were made.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        (self.folder / LOG).write_bytes(self.content[:size])
        kept = [event for event, end in zip(self.log, self.ends, strict=True) if end <= size]
        scored, asked = resumable.carry_on(self.scorer, self.folder)
        known = Counter(event.event for event in kept)
        done = known["evaluated"] + known["failed"] + known["heldout"]
        assert (scored, asked) == (self.scored - done, self.asked - known["prompted"]), size
        whole = self.ends[len(kept) - 1] if kept else 0
        assert (self.folder / LOG).read_bytes()[:whole] == self.content[:whole]
        assert told(read_log(self.folder)) == told(self.log), size
        return scored, asked


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Recorded:
    return Recorded(tmp_path_factory.mktemp("fast"), models, "random", 7)


@pytest.fixture(scope="module")
def asking(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Recorded:
    recorded = Recorded(tmp_path_factory.mktemp("asking"), models, "llm", 16)
    assert recorded.asked
    return recorded


def test_a_run_killed_at_any_event_goes_on_to_the_same_end(asking: Recorded) -> None:
    for size in (0, *asking.ends):
        asking.check(size)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1))
def test_a_run_torn_at_any_byte_goes_on_to_the_same_end(fast: Recorded, share: float) -> None:
    fast.check(round(share * len(fast.content)))


def test_a_block_of_zeros_that_a_power_cut_left_is_cut_away(fast: Recorded) -> None:
    fast.check(fast.ends[4])
    torn = fast.content[: fast.ends[4]] + b'{"event":"eval' + bytes(40)
    for tail in (b"", b'"}\n'):
        shutil.rmtree(fast.folder)
        fast.folder.mkdir()
        (fast.folder / LOG).write_bytes(torn + tail)
        resumable.carry_on(fast.scorer, fast.folder)
        assert told(read_log(fast.folder)) == told(fast.log)


Start = Callable[..., BaseProcess]


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Start a function of `resumable` in a process of its own; imports are done once, in the server they fork from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["resumable", "lm_eval.evaluator", "lm_eval.tasks", "optuna", "torch"])
    started: list[BaseProcess] = []

    def process(target: Callable[..., None], *arguments: object) -> BaseProcess:
        made = context.Process(target=target, args=arguments, daemon=False)
        made.start()
        started.append(made)
        return made

    yield process
    for made in started:
        made.kill()
        made.join()


def lines(folder: Path) -> int:
    file = folder / LOG
    return file.read_bytes().count(b"\n") if file.exists() else 0


def wait_for(what: Callable[[], object]) -> None:
    until = time.monotonic() + 300
    while not what():
        assert time.monotonic() < until
        time.sleep(0.002)


@pytest.mark.slow
def test_kill_9_at_random_moments_loses_nothing(workspace: Workspace, start: Start) -> None:
    root, run, moments = workspace.root, workspace.root / "run", random.Random(5)
    repeated = kills = 0
    (root / "diary").touch()
    while True:
        before, pages = lines(run), (root / "diary").read_text()
        known = read_log(run) if before else []
        process = start(resumable.in_child, root, run, 0.01, None, root / "output")
        at = before + moments.randint(4, 12)
        wait_for(lambda process=process, at=at: lines(run) >= at or not process.is_alive())
        time.sleep(moments.uniform(0, 0.02))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        scored = (root / "diary").read_text()[len(pages) :].splitlines()
        # All but one at most of what this process scored has to be in the log, which holds what it had before.
        new = read_log(run)[len(known) :]
        assert told(read_log(run))[: len(known)] == told(known)
        logged = sum(isinstance(event, events.Evaluated | events.HeldOut) for event in new)
        assert 0 <= len(scored) - logged <= 1
        repeated += len(set(pages.split()) & {line.split()[1] for line in scored[1:]})
        if process.exitcode != -signal.SIGKILL:
            break
    assert (process.exitcode, repeated) == (0, 0)
    assert kills >= 3
    scorer = resumable.CountedRig(resumable.config_in(root, "llm", 24), root)
    resumable.carry_on(scorer, root / "whole")
    assert told(read_log(run)) == told(read_log(root / "whole"))


def test_a_full_disk_ends_the_run_with_one_error_and_it_goes_on_when_there_is_room(
    workspace: Workspace, start: Start
) -> None:
    root, run = workspace.root, workspace.root / "run"
    scorer = resumable.CountedRig(resumable.config_in(root, "llm", 24), root)
    resumable.carry_on(scorer, root / "whole")
    size = (root / "whole" / LOG).stat().st_size
    for room in (size // 3, size // 2, size * 3 // 4, None):
        before = read_log(run) if lines(run) else []
        (root / "output").unlink(missing_ok=True)
        process = start(resumable.in_child, root, run, 0.0, room, root / "output")
        process.join(300)
        printed = (root / "output").read_text()
        assert "Traceback" not in printed
        if room is None:
            assert process.exitcode == 0, printed
            break
        assert process.exitcode == 1, printed
        assert printed.count("disk full") == 1
        assert f"llmevo resume {run}" in printed
        assert (run / LOG).read_bytes().endswith(b"\n")  # the half of a line is cut away at once
        assert len(read_log(run)) > len(before)
        assert [file.name for file in run.iterdir() if "partial" in file.name] == []
    assert told(read_log(run)) == told(read_log(root / "whole"))


def test_a_line_that_cannot_even_be_cut_away_is_cut_when_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    event = events.Told(generation=0, state="ab", sigma=None, best=None)
    with RunLog(tmp_path) as log:
        log.append(event)
        whole = log.file.read_bytes()
        write = os.write

        def half(descriptor: int, part: bytes) -> int:
            monkeypatch.setattr(os, "write", no_room)
            return write(descriptor, part[:9])

        def no_room(*_: object) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", half)
        monkeypatch.setattr(os, "truncate", no_room)
        with pytest.raises(LogError, match=r"disk full.*llmevo resume"):
            log.append(event)
        monkeypatch.undo()
    assert (tmp_path / LOG).read_bytes() == whole + whole[:9]
    with RunLog(tmp_path, resume=True) as log:
        log.append(event)
    assert len(read_log(tmp_path)) == 2


def test_only_one_process_writes_a_run(workspace: Workspace, start: Start) -> None:
    run = workspace.root / "run"
    process = start(resumable.in_child, workspace.root, run, 0.05, None, workspace.root / "output")
    wait_for(lambda: lines(run) > 2)
    status, printed = workspace.llmevo("resume", run)
    assert (status, "another process" in printed) == (2, True), printed
    process.join(300)
    assert process.exitcode == 0


def test_of_several_that_begin_a_run_at_once_one_does(tmp_path: Path, start: Start) -> None:
    processes = [start(resumable.begin, tmp_path / "run", tmp_path / "gate", tmp_path / f"won{i}") for i in range(4)]
    (tmp_path / "gate").touch()
    for process in processes:
        process.join(300)
    assert sorted(process.exitcode or 0 for process in processes) == [0, 2, 2, 2]
    assert len([*tmp_path.glob("won*")]) == 1


def test_a_child_that_outlives_its_killed_parent_does_not_hold_the_log(tmp_path: Path, start: Start) -> None:
    with RunLog(tmp_path / "run") as log:
        log.append(events.Told(generation=0, state="", sigma=None, best=None))
    process = start(resumable.hold, tmp_path / "run", tmp_path / "ready")
    wait_for((tmp_path / "ready").exists)
    with pytest.raises(RunError, match="another process"):
        RunLog(tmp_path / "run", resume=True)
    process.kill()
    process.join()
    RunLog(tmp_path / "run", resume=True).close()


def test_a_look_from_outside_does_not_keep_a_run_from_going_on(tmp_path: Path) -> None:
    import fcntl
    import threading

    RunLog(tmp_path).close()
    with (tmp_path / LOG).open("rb") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        thread = threading.Timer(0.1, lambda: fcntl.flock(reader, fcntl.LOCK_UN))
        thread.start()
        RunLog(tmp_path, resume=True).close()
        thread.join()


def verified(workspace: Workspace, run: str) -> None:
    status, printed = workspace.llmevo("replay", run, "--verify")
    assert status == 0, printed


@pytest.mark.parametrize("optimizer", ["llm", "spsa"])
def test_a_finished_run_goes_on_with_a_higher_budget_and_scores_nothing_twice(
    workspace: Workspace, optimizer: str
) -> None:
    search = {"optimizer": optimizer, "budget": 6, "population": 3, "seed": 3}
    workspace.llmevo("run", workspace.config(search=search, llm={"proposer": "simulated"}), "--out", "run")
    before = workspace.events("run")
    status, printed = workspace.llmevo("resume", "run", "--budget", 10)
    assert status == 0, printed
    assert "[10/10]" in printed
    log, state = workspace.events("run"), workspace.state("run")
    assert log[: len(before)] == before
    resumed = log[len(before)]
    assert isinstance(resumed, events.Resumed)
    assert (resumed.budget, resumed.forced, resumed.reason) == (10, [], "budget 10 evaluations")
    assert len(state.trials) == 10
    assert state.finished == log[-1]
    rows = [event.row for event in log[len(before) :] if isinstance(event, events.HeldOut)]
    assert rows in ([], ["best"])  # base, parents and uniform are known, and so may be the best
    assert state.started is not None
    assert state.started.config["search"]["budget"] == 10
    verified(workspace, "run")


def test_a_budget_raised_while_holding_out_goes_on_searching_first(workspace: Workspace) -> None:
    search = {"optimizer": "random", "budget": 4, "population": 3, "seed": 3}
    workspace.llmevo("run", workspace.config(search=search), "--out", "run")
    file = workspace.root / "run" / LOG
    cut = file.read_text().splitlines(keepends=True)[:-3]
    assert '"heldout"' in cut[-1]
    file.write_text("".join(cut))
    assert workspace.llmevo("resume", "run", "--budget", "6")[0] == 0
    kinds = [event.event for event in workspace.events("run")[len(cut) :]]
    assert kinds[:2] == ["resumed", "asked"]
    rows = [event.row for event in workspace.events("run") if isinstance(event, events.HeldOut)]
    assert len(rows) == len({*rows}) == 6
    verified(workspace, "run")


def test_a_budget_below_what_is_spent_is_refused(workspace: Workspace) -> None:
    workspace.finished(search={"optimizer": "random", "budget": 5})
    content = (workspace.root / "run" / LOG).read_bytes()
    status, printed = workspace.llmevo("resume", "run", "--budget", "4")
    assert status == 2
    assert "4 evaluations is too low, for the run has scored 5 candidates; give more than 5" in printed
    assert (workspace.root / "run" / LOG).read_bytes() == content
    # Stopped while candidates that were asked for are scored.
    asked = max(place for place, event in enumerate(workspace.events("run")) if isinstance(event, events.Asked))
    stopped = b"".join(content.splitlines(keepends=True)[: asked + 1])
    (workspace.root / "run" / LOG).write_bytes(stopped)
    status, printed = workspace.llmevo("resume", "run", "--budget", "4")
    assert status == 2
    assert "4 evaluations is too low, for the run has asked for 5 candidates; give 5 or more" in printed
    assert (workspace.root / "run" / LOG).read_bytes() == stopped


def test_a_resumed_run_whose_nothing_changed_logs_nothing_of_it(workspace: Workspace) -> None:
    workspace.finished(search={"optimizer": "random", "budget": 5})
    content = (workspace.root / "run" / LOG).read_bytes()
    (workspace.root / "run" / LOG).write_bytes(b"".join(content.splitlines(keepends=True)[:6]))
    for _ in range(2):
        assert workspace.llmevo("resume", "run")[0] == 0
        assert not workspace.state("run").resumed
    assert told(workspace.events("run")) == told(read_log_of(content, workspace.root))


def test_a_run_keeps_the_changes_of_the_command_line(workspace: Workspace) -> None:
    config = workspace.config(search={"optimizer": "random", "budget": 4, "seed": 3}, heldout=None)
    changes = ("--set", "genome.bounds={weight: [0.25, 0.75]}", "--set", "search.budget=5", "--set", "limit=4")
    assert workspace.llmevo("run", config, "--out", "run", *changes)[0] == 0
    whole = workspace.state("run")
    written = read_config(workspace.root / "run" / "config.yml")
    assert (written.search.budget.evaluations, written.limit, len(whole.recipes)) == (5, 4, 5)
    file = workspace.root / "run" / LOG
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:8]))
    assert workspace.llmevo("resume", "run")[0] == 0
    assert not workspace.state("run").resumed
    assert workspace.state("run").recipes == whole.recipes


def read_log_of(content: bytes, folder: Path) -> list[events.Event]:
    file = folder / "other.jsonl"
    file.write_bytes(content)
    return read_log(file)


SEARCH: dict[str, Any] = {"optimizer": "random", "budget": 6, "population": 3, "seed": 3}


def stopped(workspace: Workspace, **changes: Any) -> None:
    """A run that was stopped after five scores."""
    workspace.finished(search=SEARCH, **changes)
    file = workspace.root / "run" / LOG
    places = [i for i, line in enumerate(file.read_text().splitlines()) if '"evaluated"' in line]
    file.write_text("".join(file.read_text().splitlines(keepends=True)[: places[4] + 1]))


def test_the_same_command_with_resume_begins_a_run_and_goes_on_with_it(workspace: Workspace) -> None:
    config = workspace.config(search=SEARCH, heldout=None)
    assert workspace.llmevo("run", config, "--resume")[0] == 0
    whole = workspace.events("runs/config")
    file = workspace.root / "runs" / "config" / LOG
    for size in (0, 30, file.read_bytes().find(b'"evaluated"')):
        file.write_bytes(file.read_bytes()[:size])
        status, printed = workspace.llmevo("run", config, "--resume")
        assert status == 0, printed
        assert [event.event for event in workspace.events("runs/config")] == [event.event for event in whole]
    file.write_bytes(file.read_bytes()[:30])  # no run yet: it may be begun anew, and there is nothing to resume
    status, printed = workspace.llmevo("resume", "runs/config")
    assert (status, "before its first event" in printed) == (2, True), printed
    assert workspace.llmevo("run", config, "--out", "runs/config")[0] == 0


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"search": {**SEARCH, "seed": 4}}, "config.search.seed: 3 before, 4 now"),
        ({"tasks": [{"name": "letters", "weight": 2.0}]}, "config.tasks: "),
        ({"llm": {"proposer": "local", "mask_names": True}}, "config.llm.mask_names: False before, True now"),
    ],
)
def test_a_config_whose_candidates_would_be_others_is_refused_even_with_force(
    workspace: Workspace, changes: dict[str, Any], key: str
) -> None:
    stopped(workspace)
    content = (workspace.root / "run" / LOG).read_bytes()
    config = workspace.config(**{"search": SEARCH, **changes})
    for options in ((), ("--force",)):
        status, printed = workspace.llmevo("run", config, "--out", "run", "--resume", *options)
        assert status == 2
        assert key in printed
        assert "start_from" in printed
        assert (workspace.root / "run" / LOG).read_bytes() == content


def test_a_log_without_its_first_event_is_not_taken_for_one_that_was_not_begun(workspace: Workspace) -> None:
    stopped(workspace)
    file = workspace.root / "run" / LOG
    file.write_text(file.read_text().split("\n", 1)[1])
    status, printed = workspace.llmevo("resume", "run")
    assert (status, "the first event is missing" in printed) == (2, True), printed


def test_a_task_that_is_added_is_named_alone_among_the_changes() -> None:
    tasks = [{"name": f"a_task_with_a_long_name_{n}", "metric": "acc,none"} for n in range(4)]
    lines = changes.table([events.Change(key="config.tasks", before=tasks[:3], now=tasks)])
    assert lines == f"  config.tasks: {tasks[3]!r} added"


def test_a_changed_config_is_refused_with_its_difference_and_force_is_logged(workspace: Workspace) -> None:
    stopped(workspace)
    search = {**SEARCH, "budget": 8}
    config = workspace.config(search=search, limit=7, llm={"proposer": "local", "max_calls": 4})
    command = ("run", config, "--out", "run", "--resume")
    status, printed = workspace.llmevo(*command)
    assert status == 2
    for words in ("config.limit: None before, 7 now", "config.llm.max_calls: None before, 4 now", "questions.search"):
        assert words in printed
    assert "--force" in printed
    assert workspace.llmevo(*command, "--force")[0] == 0
    state = workspace.state("run")
    (resumed,) = state.resumed
    assert resumed.budget == 8
    assert {change.key for change in resumed.forced} == {"config.limit", "config.llm.max_calls", "questions.search"}
    assert [trial.score.items for trial in state.trials.values() if trial.score] == [12] * 5 + [7] * 3
    verified(workspace, "run")
    assert workspace.llmevo(*command)[0] == 0  # what was forced once is how it is now


@pytest.mark.parametrize("limit", [7, 10])
def test_candidates_scored_on_other_questions_can_be_the_best(workspace: Workspace, limit: int) -> None:
    stopped(workspace, limit=8)
    config = workspace.config(search=SEARCH, limit=limit)
    assert workspace.llmevo("run", config, "--out", "run", "--resume", "--force")[0] == 0
    state = workspace.state("run")
    assert state.started
    assert (state.started.items, state.started.selection_items) == (limit, 12 - limit)
    assert len(state.started.texts["search"]["letters"]) == limit
    assert {trial.candidate.id for trial in state.asked_all} == {*range(6)}
    verified(workspace, "run")


def test_scores_on_other_questions_are_not_compared_question_by_question() -> None:
    scored = evaluated(0, 0.5).model_copy(update={"item_scores": {"q_words_search": [1] * 10}})
    change = events.Change(key="questions.search", before="ab", now="cd")
    resumed = events.Resumed(reason="--force", forced=[change], counts={"search": 10})
    before, now = (folded([started(), asked(0, [0]), scored, *after]) for after in ([], [resumed]))
    scores = [state.trials[0].score for state in (before, now)]
    assert [score and bool(score.item_scores) for score in scores] == [True, False]


@pytest.mark.parametrize("command", [("resume", "run"), ("run", "config.yml", "--out", "run", "--resume")])
def test_changed_questions_are_refused(workspace: Workspace, command: tuple[str, ...]) -> None:
    stopped(workspace)
    file = workspace.root / "tasks" / "letters.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**row, "question": row["question"] + "?"}) + "\n" for row in rows))
    status, printed = workspace.llmevo(*command)
    assert status == 2
    assert "questions.search" in printed
    assert workspace.llmevo(*command, "--force")[0] == 0
    assert [change.key for change in workspace.state("run").resumed[0].forced] == ["questions.search"]
    verified(workspace, "run")


def test_a_corrected_answer_is_refused_and_named(workspace: Workspace) -> None:
    stopped(workspace)
    file = workspace.root / "tasks" / "letters.jsonl"
    first, *rest = [json.loads(line) for line in file.read_text().splitlines()]
    now = 1 - first["answer"]
    file.write_text("".join(json.dumps(row) + "\n" for row in [{**first, "answer": now}, *rest]))
    status, printed = workspace.llmevo("resume", "run")
    before, after = ({f"letters: Q: {first['question']} A:": first["choices"][at]} for at in (first["answer"], now))
    assert status == 2
    assert f"questions.search.answers: {before} before, {after} now" in printed
    assert "questions.search:" not in printed
    assert workspace.llmevo("resume", "run", "--force")[0] == 0
    assert [change.key for change in workspace.state("run").resumed[0].forced] == ["questions.search.answers"]
    assert workspace.llmevo("resume", "run")[0] == 0
    verified(workspace, "run")


def test_a_question_may_have_another_form_in_an_older_log() -> None:
    old = {"search": {"letters": [("", "a")]}}
    for rules, keys in ((4, []), (5, ["questions.search.answers"])):
        log = started().model_copy(update={"rules": rules, "texts": old})
        assert changes.answered(log, old) == []
        assert [change.key for change in changes.answered(log, {"search": {"letters": [("a / b", "a")]}})] == keys
        assert len(changes.answered(log, {"search": {"letters": [("", "b")]}})) == 1


def test_questions_in_another_order_are_refused(workspace: Workspace) -> None:
    stopped(workspace)
    log = workspace.root / "run" / "events.jsonl"
    first, *rest = log.read_text().splitlines()
    started = json.loads(first)
    started["texts"]["search"]["letters"].reverse()
    log.write_text("\n".join([json.dumps(started), *rest]) + "\n")
    status, printed = workspace.llmevo("resume", "run", "--trust")
    assert status == 2
    assert "questions.order" in printed
    assert workspace.llmevo("resume", "run", "--force")[0] == 0


def test_a_changed_model_is_refused(workspace: Workspace) -> None:
    from support.tiny_model import save_tiny

    stopped(workspace)
    save_tiny(workspace.root / "two", 9, tied=True)
    status, printed = workspace.llmevo("resume", "run")
    assert status == 2
    assert "sources.two.checksum" in printed
    assert "sources.one" not in printed
    status, printed = workspace.llmevo("resume", "run", "--force")
    assert status == 0, printed
    verified(workspace, "run")


def with_old_checksums(workspace: Workspace) -> None:
    """The run's log as version 0.1 would have written it."""
    log, sources = workspace.root / "run" / LOG, Sources(workspace.root)
    first, rest = log.read_text().split("\n", 1)
    started = json.loads(first)
    for source in started["sources"]:
        source["checksum"] = sources.checksum(ModelReference.parse(source["reference"]), "")
    log.write_text(json.dumps(started) + "\n" + rest)


def test_a_log_with_checksums_of_version_0_1_is_compared_by_their_rule_and_its_scores_are_known(
    workspace: Workspace,
) -> None:
    def known() -> set[tuple[str, str]]:
        state = workspace.state("run")
        assert state.started
        scorer = Scorer(config_of(state.started, "run"), workspace.root)
        scorer.remember(state)
        return {*scorer.cache.by_run}

    stopped(workspace, heldout=None)
    wanted = known()
    with_old_checksums(workspace)
    assert wanted
    assert known() == wanted
    model = workspace.root / "two" / "model.safetensors"
    content = model.read_bytes()
    model.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert not known() & wanted
    status, printed = workspace.llmevo("resume", "run", "--trust")  # the beginning of the log was edited
    assert (status, "sources.two.checksum" in printed, "sources.one" in printed) == (2, True, False), printed
    model.write_bytes(content)
    assert workspace.llmevo("resume", "run")[0] == 0
    assert workspace.state("run").resumed == []
    verified(workspace, "run")


def test_options_of_the_command_line_are_in_the_config_of_the_run(workspace: Workspace) -> None:
    workspace.finished("--seed", 4, "--budget", "7, 1 h", "--task-search-path", "tasks", search=SEARCH)
    written = read_config(workspace.root / "run" / "config.yml")
    assert (written.search.seed, written.search.budget.evaluations, written.search.budget.minutes) == (4, 7, 60)
    status, printed = workspace.llmevo("resume", "run")
    assert (status, "differs" in printed) == (0, False), printed


def test_a_run_that_goes_on_does_not_show_its_log_again(workspace: Workspace) -> None:
    stopped(workspace)
    status, printed = workspace.llmevo("resume", "run")
    assert status == 0, printed
    assert [line[:7] for line in printed.splitlines() if line.startswith("  [")] == ["  [6/6]"]
    assert f"5 of 6 evaluations are in the log, best {max(scores_of(workspace)[:5]):.3f}" in printed
    before = (workspace.root / "run" / LOG).read_bytes()
    status, printed = workspace.llmevo("resume", "run")
    assert status == 0, printed
    assert printed.startswith("run is finished; `llmevo resume run --budget N` goes on.")
    assert "held-out questions" in printed
    assert not {"  [6/6]", "Loading"} & {line[:7] for line in printed.splitlines()}
    assert (workspace.root / "run" / LOG).read_bytes() == before


def scores_of(workspace: Workspace) -> list[float]:
    return [trial.value for trial in workspace.state("run").trials.values()]


def test_a_config_that_was_edited_in_the_runs_folder_is_not_passed_over_in_silence(workspace: Workspace) -> None:
    stopped(workspace)
    file = workspace.root / "run" / "config.yml"
    given = file.read_text()
    config = yaml.safe_load(given)
    file.write_text(yaml.safe_dump({**config, "search": {**SEARCH, "budget": 50}}))  # it may have been an option
    status, printed = workspace.llmevo("resume", "run", "--budget", 7)
    assert status == 0, printed
    assert "run/config.yml differs from the log, which counts" in printed
    assert "config.search.budget: 6 before, 50 now" in printed
    file.write_text(yaml.safe_dump({**config, "limit": 5}))
    status, printed = workspace.llmevo("resume", "run", "--budget", 8)
    assert (status, "run/config.yml has changed" in printed, "config.limit: None before, 5 now" in printed) == (
        2,
        True,
        True,
    ), printed
    assert workspace.llmevo("resume", "run", "--budget", 8, "--force")[0] == 0
    state = workspace.state("run")
    assert state.started
    assert "limit" not in state.started.config
    file.write_text("# the same\n" + given)
    status, printed = workspace.llmevo("resume", "run", "--budget", 9)
    assert (status, "config.yml" in printed) == (0, False), printed


@pytest.mark.parametrize("text", ["genome: [", "tasks: nonsense", "genome:\n  telepathy: true\n"])
def test_a_config_in_the_runs_folder_that_cannot_be_read_is_a_warning(workspace: Workspace, text: str) -> None:
    stopped(workspace)
    file = workspace.root / "run" / "config.yml"
    file.write_text(text)
    status, printed = workspace.llmevo("resume", "run")
    assert status == 0, printed
    (line,) = [line for line in printed.splitlines() if "config.yml" in line]
    assert line.startswith("! run/config.yml cannot be read (")
    assert line.endswith("): changes in it do not count, the log does")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.json", "{"),
        ("config.json", "[]"),
        ("config.json", '{"num_hidden_layers": "two"}'),
        ("config.json", None),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "[]"),
    ],
)
def test_a_damaged_base_stops_a_resume_with_one_clear_error(workspace: Workspace, file: str, text: str | None) -> None:
    stopped(workspace)
    log = (workspace.root / "run" / LOG).read_bytes()
    damaged = workspace.root / "base" / file
    damaged.unlink()
    if text is not None:
        damaged.write_text(text)
    status, printed = workspace.llmevo("resume", "run")
    assert (status, "base" in printed or "config.json" in printed) == (2, True), printed
    assert (workspace.root / "run" / LOG).read_bytes() == log


def test_another_version_is_logged_where_it_comes_in(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(workspace)
    from llmevo.run import resume as resuming

    monkeypatch.setattr(resuming, "versions", lambda: {"numpy": "99.1"})
    assert workspace.llmevo("resume", "run")[0] == 0
    (resumed,) = workspace.state("run").resumed
    assert (resumed.versions, resumed.budget, resumed.forced) == ({"numpy": "99.1"}, None, [])
    verified(workspace, "run")


def test_a_log_says_at_which_line_it_stops_following_from_its_config(fast: Recorded) -> None:
    asked = next(i for i, event in enumerate(fast.log) if event.event == "asked" and i > 5)
    raw = json.loads(fast.content.splitlines()[asked])
    gene = next(iter(raw["candidates"][0]["genes"]))
    raw["candidates"][0]["genes"][gene] += 0.25
    changed = [*fast.log]
    changed[asked] = events.EVENTS.validate_python(raw)
    with pytest.raises(RunError, match=rf"line {asked + 1}: asked\.candidates\[0\]\.genes\.{gene} is .* recomputed"):
        loop.run(Experiment.of_log(RunState.fold(iter(changed)).started, Path("run")), Journal(changed))
