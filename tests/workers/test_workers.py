"""Every implementation of `Workers` scores alike, and those that lose workers go on without them."""

import os
import signal
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from llmevo.errors import CandidateError, MachineError, UserError
from llmevo.evaluation.score import Score
from llmevo.workers.local import Local
from llmevo.workers.pool import Limits
from llmevo.workers.protocol import Job, Request, Workers
from support.ray_cluster import MARKS
from support.scripted import (
    PARTS,
    Script,
    Scripted,
    ScriptedScoring,
    expected_score,
    recipe_of,
    whole_score,
)
from support.workers import assert_gone, is_alive, pool_on, requests_for, score, until

KINDS = ["processes", pytest.param("ray", marks=MARKS)]
"""The hosts of pools."""

FOREVER = 300.0
SHORT = {"unmeasured": 1.0, "question": 0.0}

RIVAL = replace(whole_score(Request(0, recipe_of(900))), item_scores={"scripted": [1.0] * sum(PARTS)}, total=1.0)


def local_of(script: Script) -> Local:
    """Scoring in this process, by the same script."""
    scorer, scoring = Scripted(script), ScriptedScoring()

    def score(request: Request) -> tuple[Score, Mapping[str, float]]:
        if known := scoring.known(request):
            return known, {}
        for part in range(len(PARTS)):
            scorer.score_part(Job(request.id, request.recipe, request.questions, part))
        scoring.keep(request, expected_score(request))
        return expected_score(request), {"evaluate": 1.0}

    return Local(score)


@pytest.fixture(params=["local", *KINDS])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=KINDS)
def host(request: pytest.FixtureRequest) -> str:
    return request.param


class TestContract:
    """What a run relies on, whatever scores."""

    def test_every_request_has_one_result(self, kind: str, tmp_path: Path) -> None:
        script = Script(tmp_path, {3: "fail"})
        requests = [*requests_for(5), *(Request(f"row {n}", recipe_of(n), "heldout") for n in range(3))]
        requests += [Request(10 + n, recipe_of(10 + n), rivals=[RIVAL]) for n in range(8)]

        def check(workers: Workers) -> None:
            assert workers.count == (1 if kind == "local" else 2)
            assert workers.free == workers.count
            workers.submit(requests[0])
            assert workers.free == workers.count - 1
            assert workers.result().id == requests[0].id
            assert workers.free == workers.count
            results = score(workers, requests[1:])
            for request in requests[1:]:
                result = results[request.id]
                if request.id == 3:
                    assert (result.score, result.reason) == (None, "3 is no model")
                    continue
                assert (result.score, result.reason, result.losses) == (expected_score(request), "", 0)
                assert result.seconds
                # A part that was asked ahead of a race's end counts for its worker, and not for the score.
                asked = sum(result.workers.values())
                assert asked == 0 if kind == "local" else asked >= expected_score(request).items
            known = score(workers, [replace(requests[1], id=77)])[77]
            assert (known.score, known.seconds, known.workers) == (expected_score(requests[1]), {}, {})

        if kind == "local":
            workers = local_of(script)
            check(workers)
            workers.close()
            return
        with pool_on(kind, script) as watched:
            check(watched.pool)
        assert {notice.change for notice in watched.notices} == {"ready"}
        assert max(Counter(script.asked()).values()) == 1

    def test_a_lost_machine_is_no_candidates_fault(self, kind: str, tmp_path: Path) -> None:
        script = Script(tmp_path, {2: "lose once"})
        if kind == "local":
            workers = local_of(script)
            for request in requests_for(3):
                workers.submit(request)
            assert workers.result().id == 1
            with pytest.raises(MachineError, match="candidate 2: the machine is out of memory") as error:
                workers.result()
            assert error.value.kind == "memory"
            return
        with pool_on(kind, script) as watched:
            results = watched.score(requests_for(3))
        assert all(results[request.id].score == whole_score(request) for request in requests_for(3))
        (lost,) = watched.changes("lost")
        assert (lost.request, lost.reason) == (2, "the machine is out of memory")

    def test_what_is_open_when_it_closes_is_forgotten(self, kind: str, tmp_path: Path) -> None:
        script = Script(tmp_path, {1: "hang"})
        if kind == "local":
            workers = local_of(script)
            workers.submit(requests_for(1)[0])
            workers.close()
            assert workers.free == 1
            return
        with pool_on(kind, script) as watched:
            watched.pool.submit(requests_for(1)[0])
            until(script.asked)


DEATHS = [
    *((place, "die once") for place in ("import", "greet", "load", 2, (2, 2))),
    *((place, "exit once") for place in ("import", 2)),
    *((place, "break once") for place in ("greet", (2, 2))),
]


@pytest.mark.parametrize(("place", "act"), DEATHS, ids=str)
def test_a_worker_that_dies_anywhere_costs_nothing_but_its_part(
    host: str, tmp_path: Path, place: object, act: str
) -> None:
    script = Script(tmp_path, {place: act})
    with pool_on(host, script) as watched:
        results = watched.score(requests_for(4))
    for request in requests_for(4):
        assert results[request.id].score == whole_score(request)
    (lost,) = watched.changes("lost")
    assert lost.reason
    assert not watched.changes("refused")
    of = 2 if place not in ("import", "greet", "load") else None
    assert lost.request == of
    assert [n for n in results if results[n].losses] == ([of] if of else [])
    twice = {(number, part) for (number, part), count in Counter(script.asked()).items() if count > 1}
    assert twice <= {("2", 0), ("2", 1), ("2", 2), ("control", 0)}
    assert len(twice) == (of is not None)


@pytest.mark.parametrize("doing", ["greets", "loads", "asked 1 0", "idle"])
def test_a_worker_that_is_killed_is_replaced(host: str, tmp_path: Path, doing: str) -> None:
    place: object = {"greets": "greet", "loads": "load", "asked 1 0": (1, 0)}.get(doing)
    script = Script(tmp_path, {place: "wait 0.4"} if place else {})
    requests = requests_for(2)
    with pool_on(host, script, count=1) as watched:
        if doing == "idle":
            watched.score(requests[:1])
        else:
            watched.pool.submit(requests[0])
        (victim, *_) = until(lambda: script.processes("loads" if doing == "idle" else doing))
        os.kill(victim, signal.SIGKILL)
        if doing == "idle":  # it is replaced before there is anything to do
            until(lambda: len(script.processes("asked control")) == 1)
        result = watched.score(requests[1:])[2] if doing == "idle" else watched.pool.result()
    assert result.score == whole_score(requests[result.id == 2])
    (lost,) = watched.changes("lost")
    assert "killed by signal 9" in lost.reason or host != "processes"
    assert [notice.worker for notice in watched.changes("ready")][-1] == "1.2"
    assert result.losses == (doing == "asked 1 0")


@pytest.mark.parametrize(("place", "stage"), [("greet", "starting"), ("load", "loading"), (1, "scoring")], ids=str)
def test_a_worker_that_hangs_is_replaced(host: str, tmp_path: Path, place: object, stage: str) -> None:
    script = Script(tmp_path, {place: "hang once"})
    limits = Limits(greeting=FOREVER, loading=FOREVER, unmeasured=FOREVER, least=FOREVER)
    limits = replace(limits, **{"starting": {"greeting": 4.0}, "loading": {"loading": 1.0}}.get(stage, SHORT))
    with pool_on(host, script, count=1, limits=limits) as watched:
        result = watched.score(requests_for(1))[1]
    assert result.score == whole_score(requests_for(1)[0])
    assert result.losses == (stage == "scoring")
    (lost,) = watched.changes("lost")
    assert lost.reason.startswith(f"it hung ({stage} for ")


def test_a_worker_may_be_slower_than_those_before_it(host: str, tmp_path: Path) -> None:
    script = Script(tmp_path, {(2, 0): "wait 1.5"})
    with pool_on(host, script, count=1, limits=Limits(unmeasured=FOREVER, least=2.5, slack=1.0)) as watched:
        results = watched.score(requests_for(2))
    assert not any(result.losses for result in results.values())


def test_an_engine_that_dies_is_started_again_and_none_is_left(host: str, tmp_path: Path) -> None:
    script = Script(tmp_path, {"load": "child", (1, 1): "wait 0.5"})
    with pool_on(host, script, count=1) as watched:
        watched.pool.submit(requests_for(1)[0])
        until(lambda: ("1", 1) in script.asked())
        os.kill(script.children()[0], signal.SIGKILL)
        result = watched.pool.result()
        assert (result.score, result.losses) == (whole_score(requests_for(1)[0]), 1)
        assert watched.changes("lost")[0].reason == "the engine died"
        until(lambda: not is_alive(script.processes("loads")[0]))
        os.kill(script.processes("loads")[1], signal.SIGKILL)
        until(lambda: len(script.children()) == 3)
    assert_gone(script.children())


def test_a_recipe_that_kills_every_engine_is_given_up_and_the_others_are_scored(host: str, tmp_path: Path) -> None:
    script = Script(tmp_path, {3: "die"})
    with pool_on(host, script) as watched:
        results = watched.score(requests_for(2)) | watched.score([*requests_for(6)[2:]])
        alone = watched.score(requests_for(7)[6:])
    killed = sum(name == "3" for name, _ in script.asked())
    assert (results[3].score, results[3].losses) == (None, killed)
    assert killed >= 2  # two at the same time count as one
    assert results[3].reason.startswith("lost twice on different workers: ")
    assert all(results[request.id].score == whole_score(request) for request in requests_for(6) if request.id != 3)
    assert alone[7].score


@pytest.mark.parametrize("count", [1, 2])
def test_a_recipe_that_kills_engines_is_given_up_though_nothing_else_is_scored(
    host: str, tmp_path: Path, count: int
) -> None:
    script = Script(tmp_path, {1: "die"})
    with pool_on(host, script, count) as watched:
        result = watched.score([replace(requests_for(1)[0], rivals=[RIVAL])])[1]
    assert result.reason.startswith("lost twice on different workers: ")
    assert result.losses >= 2  # two at the same time count as one


@pytest.mark.parametrize("answered", [False, True], ids=["from the beginning", "later"])
def test_a_machine_on_which_every_worker_dies_ends_the_session_and_fails_no_candidate(
    host: str, tmp_path: Path, answered: bool
) -> None:
    numbers = [request.id for request in requests_for(8)]
    script = Script(tmp_path, {**dict.fromkeys(numbers, "lose ill"), "control": "lose ill"})
    with pool_on(host, script) as watched:
        if answered:
            watched.score([Request(20 + n, recipe_of(20 + n)) for n in range(4)])
        (tmp_path / "ill").touch()
        for request in requests_for(8):
            watched.pool.submit(request)
        for _ in range(2):  # also when it is asked again
            with pytest.raises(MachineError, match="the machine is out of memory"):
                watched.pool.result()


def test_recipes_that_kill_engines_end_no_session_however_many_they_are(host: str, tmp_path: Path) -> None:
    script = Script(tmp_path, {request.id: "lose" for request in requests_for(5)})
    with pool_on(host, script) as watched:
        results = watched.score(requests_for(6))
    reason = "lost twice on different workers: the machine is out of memory"
    assert [results[number].reason for number in range(1, 7)] == [*[reason] * 5, ""]


def test_a_worker_that_cannot_be_used_is_left_out(host: str, tmp_path: Path) -> None:
    script = Script(tmp_path, {"greet": "refuse once"})
    with pool_on(host, script) as watched:
        results = watched.score(requests_for(4))
        assert watched.pool.free == 1
    assert all(results[request.id].score == whole_score(request) for request in requests_for(4))
    (refused,) = watched.changes("refused")
    assert refused.reason == "the model org/none cannot be found"
    assert len(script.processes()) == 2


@pytest.mark.parametrize(
    ("act", "says"),
    [
        ("refuse", "cannot be used: the model org/none cannot be found"),
        ("differ", "cannot be used: it differs from this machine: dtype is other there and None here"),
    ],
)
def test_a_run_none_of_whose_workers_can_be_used_ends_as_a_mistake(
    host: str, tmp_path: Path, act: str, says: str
) -> None:
    with pool_on(host, Script(tmp_path, {"greet": act})) as watched:
        watched.pool.submit(requests_for(1)[0])
        with pytest.raises(UserError, match=says):
            watched.pool.result()


def test_a_worker_that_does_not_start_twice_is_left_out(host: str, tmp_path: Path) -> None:
    script = Script(tmp_path, {"load": "exit"})
    with pool_on(host, script) as watched:
        watched.pool.submit(requests_for(1)[0])
        with pytest.raises(MachineError, match=r"worker \d did not start twice: .*"):
            watched.pool.result()
        assert len(watched.changes("lost")) >= 2
    assert len(script.processes()) in (3, 4)
    assert watched.changes("refused")


def test_a_candidate_that_fails_takes_time(host: str, tmp_path: Path) -> None:
    script = Script(tmp_path, {1: "wait 0.2", (1, 0): "fail"})
    with pool_on(host, script, 1) as watched:
        result = watched.score(requests_for(1))[1]
    assert result.score is None
    assert result.seconds["evaluate"] >= 0.2


def test_a_candidate_that_fails_in_several_parts_has_one_reason(host: str, tmp_path: Path) -> None:
    script = Script(tmp_path, {(1, 0): "fail", (1, 1): "wait 0.1", (1, 2): "fail"})
    with pool_on(host, script, 3) as watched:
        assert watched.score(requests_for(1))[1].reason == "(1, 0) is no model"


def test_what_workers_warn_of_is_told_once(host: str, tmp_path: Path) -> None:
    script = Script(
        tmp_path, {"load": "warn the gate is off", 1: "warn memory ran out", (2, 0): "warn the gate is off"}
    )
    scoring = ScriptedScoring()
    with pool_on(host, script, 2, scoring=scoring) as watched:
        watched.score(requests_for(3))
    assert sorted(scoring.warnings) == ["memory ran out", "the gate is off"]


def test_a_failure_in_this_process_has_the_seconds_that_the_scorer_took() -> None:
    def fail(_: Request) -> tuple[Score, Mapping[str, float]]:
        error = CandidateError("it is no model")
        error.seconds = 0.25  # without those of loading the engine
        raise error

    local = Local(fail)
    local.submit(Request(1, recipe_of(1)))
    assert local.result().seconds == {"evaluate": 0.25}
