"""Comparisons whose runs go on at the same time: each as it would be alone, whatever becomes of the others."""

import _thread
import signal
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from llmevo.errors import ProposerRefused, RunError
from llmevo.evaluation.tasks.lm_eval import quiet
from llmevo.llm.client import Reply, Request
from llmevo.run.comparison import ComparedRun, ComparisonRuns
from llmevo.run.log import events
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import LOG, read_log
from llmevo.run.verify import verify
from llmevo.search.simulated_llm import SimulatedClient
from support.scripted import Script
from support.scripted_run import ScriptedRig, config_in, essence
from support.tiny_model import save_tiny
from support.workspace import write_questions

OPTIMIZERS = ("llm-off", "random")


def nothing(*_: object) -> None:
    """Watch nothing."""


def comparison(
    place: Path, out: str, workers: int, optimizers: Sequence[str] = OPTIMIZERS, seeds: int = 2, **config: Any
) -> ComparisonRuns:
    """With workers by a script."""
    made = ComparisonRuns(config_in(place, workers, budget=10, **config), "", place, place / out, optimizers, seeds)
    folder = place / f"{out}-workers"
    folder.mkdir(exist_ok=True)
    script = Script(folder, seconds=0.01)
    vars(made)["scorer"] = ScriptedRig(made.config_of(made.entries[0]), place, script=script)
    return made


def played(
    sweep: ComparisonRuns, watch: Callable[[ComparedRun, events.Event, RunState], None] = nothing
) -> list[ComparedRun]:
    sweep.check()
    with closing(sweep.play(watch)) as runs:
        return [*runs]


def logs(sweep: ComparisonRuns) -> dict[str, list[dict[str, Any]]]:
    """What each run's log says, but for times, workers and what was known; every log verifies."""
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in sweep.entries:
        log = read_log(entry.folder)
        assert verify(log, entry.folder)
        found[entry.name] = [{k: v for k, v in said.items() if k != "cached"} for said in essence(log)]
    return found


@pytest.fixture
def place(tmp_path: Path, models: Path) -> Path:
    write_questions(tmp_path, models)
    return tmp_path


def test_runs_at_the_same_time_are_what_they_are_one_after_the_other(place: Path) -> None:
    alone, together = comparison(place, "alone", 1), comparison(place, "together", 3)
    assert played(alone) == alone.entries
    order: list[tuple[str, str]] = []
    assert {*played(together, lambda entry, event, _: order.append((entry.name, event.event)))} == {*together.entries}
    assert logs(alone) == logs(together)
    begun = [name for name, _ in order[: order.index(next(e for e in order if e[1] == "run_finished"))]]
    assert len({*begun}) >= 3
    every = [event for entry in together.entries for event in read_log(entry.folder)]
    assert any(isinstance(event, events.Evaluated) and event.rival is not None for event in every)  # raced
    assert {event.workers for event in every if isinstance(event, events.RunStarted)} == {1}
    assert not [thread for thread in threading.enumerate() if "seed" in thread.name]
    # The first start row is the same in all runs, and was asked once.
    uniform = [event for event in every if isinstance(event, events.Evaluated) and event.candidate == 0]
    assert sum(not event.cached for event in uniform) == 1


def test_what_another_run_knows_changes_no_result(place: Path) -> None:
    """The finals of a run ask what its search had not: a later run with the same start rows must not profit."""
    whole = comparison(place, "whole", 1)
    played(whole)
    last = whole.entries[-1]
    search = {"seed": last.seed, "evaluation_seed": 3}
    single = comparison(place, "single", 1, [last.optimizer], 1, search=search)
    played(single)
    assert logs(whole)[last.name] == logs(single)[last.name]


@pytest.fixture
def interruptible() -> Generator[None]:
    """Ctrl-C interrupts, whatever the tests' own parent ignores, as nohup does."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("at", [0, 7, 30])
@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_stops_all_runs_and_the_comparison_goes_on(place: Path, at: int) -> None:
    whole, stopped = comparison(place, "whole", 1), comparison(place, "stopped", 2)
    played(whole)
    seen: list[events.Event] = []

    def interrupt(_: ComparedRun, event: events.Event, __: RunState) -> None:
        if len(seen) == at:
            _thread.interrupt_main()
        seen.append(event)

    with pytest.raises(KeyboardInterrupt):
        played(stopped, interrupt)
    assert not [thread for thread in threading.enumerate() if "seed" in thread.name]
    before = {file: file.read_bytes() for file in (place / "stopped").glob(f"*/{LOG}")}
    assert before
    played(comparison(place, "stopped", 2))
    assert all(file.read_bytes().startswith(text) for file, text in before.items())
    assert logs(whole) == logs(stopped)


def change_a_question(place: Path) -> None:
    file = place / "tasks" / "letters.jsonl"
    file.write_text(file.read_text().replace("letters 0", "letters zero"))


def change_a_model(place: Path) -> None:
    save_tiny(place / "two", 9, tied=True)


CHANGES = [(change_a_question, "questions.search"), (change_a_model, "sources.two.checksum")]


@pytest.mark.parametrize(("change", "key"), CHANGES)
def test_a_run_is_not_carried_on_with_other_questions_or_models(
    place: Path, change: Callable[[Path], None], key: str
) -> None:
    begun = comparison(place, "c", 1, ["random"], 1)
    played(begun)
    log = begun.entries[0].folder / LOG
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-4]))
    change(place)
    with pytest.raises(RunError, match=f"(?s)random-3: .* has changed since the run began:\n  {key}: .*another --out"):
        played(comparison(place, "c", 1, ["random"], 1))


def test_runs_are_not_added_to_finished_ones_of_other_models(place: Path) -> None:
    played(comparison(place, "c", 1, ["random"], 1))
    change_a_model(place)
    with pytest.raises(RunError, match=r"random-3: a model has changed"):
        played(comparison(place, "c", 1, ["random"], 2))


def test_finished_runs_are_compared_whatever_has_changed(place: Path) -> None:
    whole = comparison(place, "c", 1, ["random"], 1)
    played(whole)
    change_a_model(place)
    assert played(comparison(place, "c", 1, ["random"], 1)) == whole.entries


def test_an_llm_that_refuses_one_run_ends_all_and_their_logs_are_whole(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = SimulatedClient.answer, list[int]()

    def refuse(client: SimulatedClient, request: Request) -> Reply:
        asked.append(1)
        if len(asked) == 2:
            raise ProposerRefused("no more credit")
        return real(client, request)

    options: Any = {"optimizers": ("llm", "random"), "llm": {"proposer": "simulated", "model": "random"}}
    whole, broken = comparison(place, "whole", 1, **options), comparison(place, "broken", 2, **options)
    played(whole)
    with monkeypatch.context() as patch:
        patch.setattr(SimulatedClient, "answer", refuse)
        with pytest.raises(ProposerRefused, match="no more credit"):
            played(broken)
    for file in (place / "broken").glob(f"*/{LOG}"):
        verify(read_log(file.parent), file.parent)
    played(comparison(place, "broken", 2, **options))
    kept = [logs(sweep) for sweep in (whole, broken)]
    for said in (said for found in kept for log in found.values() for said in log):
        said.pop("seconds", None)
    assert kept[0] == kept[1]


def test_the_error_that_ends_a_comparison_is_printed_while_a_run_that_is_left_behind_redirects_errors(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, ends, stderr = threading.Event(), threading.Event(), sys.stderr
    real = SimulatedClient.answer

    def slow(client: SimulatedClient, request: Request) -> Reply:
        with quiet():
            waits.set()
            assert ends.wait(60)
        return real(client, request)

    def watch(entry: ComparedRun, _: events.Event, __: RunState) -> None:
        if entry.optimizer == "random" and waits.is_set():
            raise ProposerRefused("no more credit")

    monkeypatch.setattr(SimulatedClient, "answer", slow)
    monkeypatch.setattr("llmevo.run.comparison.PATIENCE", 0.1)
    with pytest.raises(ProposerRefused, match="no more credit"):
        played(comparison(place, "c", 2, ("llm", "random")), watch)
    assert waits.is_set()
    left, printed_to = [thread for thread in threading.enumerate() if "seed" in thread.name], sys.stderr
    ends.set()
    for thread in left:
        thread.join(60)
    assert left
    assert printed_to is stderr is sys.stderr


def test_other_runs_go_on_while_an_llm_is_awaited(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, other = SimulatedClient.answer, threading.Event()

    def slow(client: SimulatedClient, request: Request) -> Reply:
        assert other.wait(60)
        return real(client, request)

    monkeypatch.setattr(SimulatedClient, "answer", slow)

    def watch(entry: ComparedRun, event: events.Event, _: RunState) -> None:
        if entry.optimizer == "random" and isinstance(event, events.RunFinished):
            other.set()

    assert len(played(comparison(place, "c", 2, ("llm", "random")), watch)) == 4
