"""Scores in the format in which a model is served: `engine.quantize`."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from llmevo.config import read_config
from llmevo.run.log import events
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import LOG
from llmevo.run.progress import seconds_left
from support.workspace import Workspace

SEARCH = {"optimizer": "cma-es", "budget": 9, "population": 3, "seed": 3, "finalists": 2}


PLAIN = {"backend": "hf", "device": "cpu", "self_check": False}


def settings(at: str = "finalists", **changes: Any) -> dict[str, Any]:
    """A run on 8 search questions and 4 further ones, with weights rounded to four bits."""
    engine = {**PLAIN, "quantize": "q4_0", "quantize_at": at}
    return {"search": SEARCH, "limit": 8, "engine": engine, **changes}


def essence(log: list[events.Event]) -> list[dict[str, Any]]:
    """Events without times."""
    kept = [event.model_dump(mode="json", exclude={"time", "seconds", "cached"}) for event in log]
    return [event for event in kept if event["event"] != "resumed"]


def test_finalists_are_scored_as_they_are_served_and_the_best_of_these_is_handed_over(workspace: Workspace) -> None:
    workspace.finished(**settings())
    state, log = workspace.state("run"), workspace.events("run")
    assert {event.quantized for event in log if isinstance(event, events.Evaluated | events.Selected)} == {""}
    assert {event.quantized for event in state.served.values()} == {"q4_0"}
    assert state.served.keys() == {(number, asked) for number in state.selected for asked in ("search", "selection")}
    merged = {number: state.as_merged(state.trials[number]) for number in state.selected}
    served = {number: state.as_served(state.trials[number]) for number in state.selected}
    assert {score.items for score in (*merged.values(), *served.values())} == {12}
    assert any(merged[number].item_scores != served[number].item_scores for number in merged)
    assert state.best
    assert state.best.candidate.id == max(served, key=lambda number: served[number].total)
    rows = state.heldout
    assert [name for name, row in rows.items() if row.quantized] == ["best (q4_0)"]
    assert rows["best (q4_0)"].candidate == rows["best"].candidate == state.best.candidate.id
    assert rows["best (q4_0)"].item_scores != rows["best"].item_scores
    assert workspace.llmevo("replay", "run", "--verify")[0] == 0


def test_the_search_is_that_of_a_run_without_formats(workspace: Workspace) -> None:
    workspace.finished(out="plain", **settings(engine=PLAIN))
    workspace.finished(**settings())
    kinds = events.Asked | events.Evaluated | events.Selected
    one, other = (essence([e for e in workspace.events(run) if isinstance(e, kinds)]) for run in ("run", "plain"))
    assert one == other


def test_without_further_questions_the_search_questions_choose(workspace: Workspace) -> None:
    workspace.finished(**settings(limit=None))
    state = workspace.state("run")
    assert not state.selected
    assert {asked for _, asked in state.served} == {"search"}
    best = max(state.served_finalists, key=lambda trial: state.as_served(trial).total)
    assert state.best == best
    assert workspace.llmevo("replay", "run", "--verify")[0] == 0


def test_all_candidates_can_be_scored_as_they_are_served(workspace: Workspace) -> None:
    workspace.finished(out="plain", **settings(engine=PLAIN))
    workspace.finished(**settings("all"))
    state, log = workspace.state("run"), workspace.events("run")
    scored = [event for event in log if isinstance(event, events.Scored)]
    assert [event for event in scored if event.quantized != "q4_0"] == [state.heldout["best (float32)"]]
    assert not state.served
    plain = workspace.state("plain")
    assert [trial.value for trial in state.trials.values()] != [trial.value for trial in plain.trials.values()]
    assert workspace.llmevo("replay", "run", "--verify")[0] == 0


@pytest.mark.parametrize("kind", ["first served", "last served", "best (q4_0)"])
def test_a_run_that_was_stopped_in_the_finals_ends_as_if_it_was_not(workspace: Workspace, kind: str) -> None:
    workspace.finished(**settings())
    whole, file = workspace.events("run"), workspace.root / "run" / LOG
    served = [place for place, event in enumerate(whole) if isinstance(event, events.Served)]
    row = [place for place, event in enumerate(whole) if getattr(event, "row", "") == "best (q4_0)"]
    cut = {"first served": served[0], "last served": served[-1], "best (q4_0)": row[0]}[kind]
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:cut]))
    status, printed = workspace.llmevo("resume", "run")
    assert status == 0, printed
    assert essence(workspace.events("run")) == essence(whole)


def test_a_raised_budget_takes_the_scores_of_earlier_finalists_over(workspace: Workspace) -> None:
    workspace.finished(**settings())
    before = workspace.state("run")
    assert workspace.llmevo("resume", "run", "--budget", 12)[0] == 0
    log, state = workspace.events("run"), workspace.state("run")
    resumed = next(place for place, event in enumerate(log) if isinstance(event, events.Resumed))
    again = [event for event in log[resumed:] if isinstance(event, events.Served)]
    assert {event.generation for event in again} == {len(state.told)} != {len(before.told)}
    known = [event for event in again if (event.candidate, event.questions) in before.served]
    assert known
    assert all(event.cached and not event.seconds for event in known)
    assert len(state.served_finalists) * 2 == len(again)
    assert workspace.llmevo("replay", "run", "--verify")[0] == 0


def test_another_format_needs_another_run(workspace: Workspace) -> None:
    workspace.finished(**settings())
    for engine in ({"quantize": "fp8"}, {"quantize_at": "all"}, {"quantize": None, "quantize_at": None}):
        both = {key: value for key, value in {**settings()["engine"], **engine}.items() if value is not None}
        config = workspace.config(**settings(engine=both))
        status, printed = workspace.llmevo("run", config, "--out", "run", "--resume", "--force")
        assert status == 2
        assert f"engine.{next(iter(engine))}" in printed


def test_a_changed_score_or_format_is_found(workspace: Workspace) -> None:
    workspace.finished(**settings())
    file = workspace.root / "run" / LOG
    lines = file.read_text().splitlines(keepends=True)
    place = next(place for place, line in enumerate(lines) if json.loads(line)["event"] == "served")
    for key, value in (("quantized", "q8_0"), ("questions", "selection"), ("score", 0.987), ("finalists", 2)):
        changed = json.dumps({**json.loads(lines[place]), key: value}) + "\n"
        file.write_text("".join([*lines[:place], changed, *lines[place + 1 :]]))
        status, printed = workspace.llmevo("replay", "run", "--verify")
        assert status != 0, key
        assert f"line {place + 1}: served.{key} is" in printed


def test_workers_round_as_one_process_does(workspace: Workspace) -> None:
    workspace.finished(out="two", **settings(engine={**settings()["engine"], "workers": 2, "on": "processes"}))
    workspace.finished(**settings())
    one = workspace.state("run")
    two = workspace.state("two")
    assert {worker for event in two.served.values() for worker in event.workers}

    def scores(state: RunState) -> dict[str, dict[str, list[int | float]]]:
        """The answers as served, by recipe and questions: candidates have other numbers with several workers."""
        return {f"{state.recipes[n]} {asked}": event.item_scores for (n, asked), event in state.served.items()}

    shared = scores(one).keys() & scores(two).keys()
    assert len(shared) >= 4
    assert all(scores(one)[name] == scores(two)[name] for name in shared)
    assert workspace.llmevo("replay", "two", "--verify")[0] == 0


def test_the_time_left_counts_finalists_once_more_and_the_best_in_both_forms(workspace: Workspace) -> None:
    workspace.finished(**settings())
    config, finals = read_config(workspace.root / "config.yml"), (events.Served, events.HeldOut)
    log = [
        e.model_copy(update={"seconds": {"evaluate": 1.0}}) if isinstance(e, finals) else e
        for e in workspace.events("run")
    ]
    for kind in finals:
        places = [place + 1 for place, event in enumerate(log) if isinstance(event, kind)]
        ahead = [seconds_left(RunState.fold(iter(log[:place])), config) for place in places]
        assert [one - other for one, other in pairwise(ahead)] == pytest.approx([1.0] * (len(places) - 1))
    assert seconds_left(RunState.fold(iter(log[: len(log) - 1])), config) == 0


def test_reports_show_both_scores(workspace: Workspace) -> None:
    printed = workspace.finished(**settings())
    state = workspace.state("run")
    best, served = state.heldout["best"], state.heldout["best (q4_0)"]
    both = f"{served.score:.3f} ± {served.stderr:.3f}", f"{best.score:.3f} ± {best.stderr:.3f}"
    sentence = f"Rounded to q4_0, as it will be served, the best scores {both[0]} on the held-out questions"
    assert sentence in printed
    assert "as merged" in printed
    assert "in q4_0" in printed
    assert f"{both[1]} as merged" in printed
    assert f"in q4_0 the best holds out {both[0]}" in " ".join(workspace.llmevo("status", "run")[1].split())
    assert workspace.llmevo("report", "run")[0] == 0
    page = (workspace.root / "run" / "report.html").read_text()
    assert "As it will be served" in page
    assert sentence in page
    assert workspace.llmevo("export", "run", "model")[0] == 0
    card = (workspace.root / "model" / "README.md").read_text()
    assert f"| best | {both[1]} |" in card
    assert f"| best (q4_0) | {both[0]} |" in card
    assert workspace.llmevo("export", "run", "shared", "--recipe-only")[0] == 0
    assert workspace.llmevo("replay", Path("shared"), "--verify", "--trust")[0] == 0
    shared = [json.loads(line) for line in (workspace.root / "shared" / LOG).read_text().splitlines()]
    assert [line["quantized"] for line in shared if line["event"] == "served"]
    assert shared[0]["config"]["engine"]["quantize"] == "q4_0"
