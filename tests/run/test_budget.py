"""Bounds of several kinds: how they are written, and where a search ends by each."""

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from llmevo.config import MANY, Budget, parse_budget
from llmevo.errors import ConfigError
from llmevo.evaluation.score import Score
from llmevo.run.log.events import Evaluated, Judged, Prompted, RunStarted
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import read_log
from llmevo.run.spending import Spending
from llmevo.search.trial import Candidate, Trial
from support.fake_server import Answer, chat, serving
from support.resumable import CountedRig, carry_on, config_in
from support.workspace import Workspace, write_questions


def started(items: int) -> RunStarted:
    plain: dict[str, Any] = {"config": {}, "root": "", "prompts": {}, "versions": {}, "sources": [], "genes": []}
    return RunStarted(**plain, seed=0, layers=1, items=items, heldout_items=0, proposer="", style="")


def prompted(generation: int, seconds: float = 0.0, cost: float = 0.0) -> Prompted:
    plain: dict[str, Any] = {"model": "m", "style": "chat", "messages": [], "reply": "", "tokens": {}, "problems": []}
    return Prompted(**plain, generation=generation, cost=cost, seconds=seconds, analysis="", used=1)


@dataclass
class Past:
    """A run that has scored some candidates in so many seconds each."""

    seconds: list[float]
    prompts: list[Prompted] = field(default_factory=list[Prompted])

    @property
    def state(self) -> RunState:
        trials = {
            place: Trial(Candidate(place, 0, "random", {}), Score(0.5, 0.0, {}, 20), seconds={"evaluate": seconds})
            for place, seconds in enumerate(self.seconds)
        }
        return RunState(started=started(20), trials=trials, prompted=self.prompts)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("100", Budget(evaluations=100)),
        ("100 evaluations", Budget(evaluations=100)),
        ("50000 items", Budget(items=50000)),
        ("50_000 questions", Budget(items=50000)),
        ("50,000 items, 100", Budget(evaluations=100, items=50000)),
        ("60 min", Budget(minutes=60)),
        ("1.5h", Budget(minutes=90)),
        ("$5", Budget(cost=5)),
        ("0.5 cost", Budget(cost=0.5)),
        ("100, 50000 items, 60 min, 5 cost", Budget(evaluations=100, items=50000, minutes=60, cost=5)),
    ],
)
def test_a_budget_is_written_as_people_write_it(text: str, expected: Budget) -> None:
    assert parse_budget(text) == expected
    assert Budget.model_validate(expected.model_dump(mode="json")) == expected
    assert parse_budget(str(expected)) == expected
    earlier: dict[str, float] = {"evaluations": 7, "items": 8, "minutes": 7}
    assert parse_budget("7 min, 7", "8 items", text) == Budget.model_validate({**earlier, **expected.bounds})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("many", "'many' is no amount"),
        ("", "'' is no amount"),
        ("5 parsecs", "'5 parsecs' is no amount"),
        ("$5 min", "'$5 min' is no amount"),
        ("60 min, 1 h", "gives minutes twice"),
        ("0", "greater than or equal to 1 (it is '0')"),
        ("2.5", "(it is '2.5')"),
        ("0 min", "greater than 0"),
    ],
)
def test_what_cannot_be_read_is_named_with_the_way_out(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        parse_budget(text)
    assert str(caught.value).startswith("--budget: ")


@pytest.mark.parametrize("value", [True, None, {}, [], {"items": 0}, {"hours": 2}, "x"])
def test_what_is_no_budget_in_a_config_is_refused(value: object) -> None:
    with pytest.raises(ValidationError):
        Budget.model_validate(value)


def test_a_number_stays_a_number_and_another_bound_leaves_a_stated_number_of_evaluations() -> None:
    assert Budget(evaluations=7).model_dump(mode="json") == 7
    assert Budget(minutes=3).model_dump(mode="json") == {"evaluations": MANY, "minutes": 3}
    assert Budget(evaluations=7).bounds == {"evaluations": 7}
    assert Budget(minutes=3).bounds == {"minutes": 3}


def test_the_next_generation_is_what_still_fits() -> None:
    ten = Past([6.0] * 9 + [10.0]).state  # 64 s, 200 questions
    assert Spending(Budget(evaluations=12), ten).next_size(5) == 2
    assert Spending(Budget(evaluations=10), ten).next_size(5) == 0
    assert Spending(Budget(items=279), ten).next_size(5) == 3
    assert Spending(Budget(items=219), ten).next_size(5) == 0
    assert Spending(Budget(minutes=104.5 / 60), ten).next_size(5) == 4  # the slowest took 10 s
    assert Spending(Budget(minutes=73 / 60), ten).next_size(5) == 0
    assert Spending(Budget(minutes=60), ten).next_size(5) == 5
    assert (
        Spending(Budget(minutes=90 / 60), Past([50.0, *[1.0] * 5]).state).next_size(5) == 5
    )  # what was slow once is so no more
    assert Spending(Budget(evaluations=13, items=240, minutes=60), ten).next_size(5) == 2


def test_asking_takes_time_and_money_and_both_are_kept_for_the_next_time() -> None:
    asked = Past([1.0] * 4, [prompted(1, 10, 1.0), prompted(1, 10, 1.0), prompted(2, 5, 0.5)]).state
    assert Spending(Budget(minutes=1), asked).next_size(50) == 11  # 29 s are spent, 20 are kept for asking
    assert Spending(Budget(cost=4.5), asked).next_size(5) == 5
    assert Spending(Budget(cost=4.4), asked).next_size(5) == 0  # 2.5 are spent, the dearest generation took 2
    assert Spending(Budget(cost=1), Past([]).state).next_size(5) == 5  # what a call costs is not known before the first


def judged(generation: int, cost: float) -> Judged:
    said: dict[str, Any] = {"task": "chat", "seconds": 0.0, "model": "m", "calls": 1, "tokens": {}, "verdicts": []}
    return Judged(**said, generation=generation, cost=cost, questions="search")


def test_what_judges_take_is_counted_by_candidate_and_for_those_that_are_being_scored() -> None:
    past = Past([1.0] * 6, [prompted(1, cost=0.5)]).state  # six start rows
    past.started = started(20).model_copy(update={"rules": 5})
    past.searched = past.trials
    past.judged = [judged(0, 4.0), judged(0, 2.0)]
    assert Spending(Budget(cost=10), past).next_size(5) == 3  # 3.5 are left, 0.5 of them for the next prompt
    past.candidates |= {number: Candidate(number, 1, "random", {}) for number in range(8)}
    assert Spending(Budget(cost=10), past).next_size(5) == 1
    assert Spending(Budget(cost=7.4), past).next_size(5) == 0
    past.judged = []
    assert Spending(Budget(cost=1), past).next_size(5) == 5
    assert Spending(Budget(cost=0.9), past).next_size(5) == 0


def test_a_search_whose_start_rows_took_all_ends_after_them() -> None:
    rows = Past([70.0, 50.0], [prompted(1, cost=2)]).state
    for budget in (Budget(evaluations=1), Budget(items=10), Budget(minutes=1), Budget(cost=1)):
        assert Spending(budget, rows).next_size(4) == 0
        assert Spending(budget, rows).progress == 1
        assert Spending(budget, rows).evaluations_ahead == 0


def test_a_preparation_is_spent_once_and_not_expected_again() -> None:
    past = Past([10.0] * 6).state
    past.started, past.searched = started(20).model_copy(update={"rules": 5}), past.trials
    plain = Spending(Budget(minutes=10), past)
    assert (plain.next_size(8), plain.evaluations_ahead) == (8, 54)
    past.trials[0] = replace(past.trials[0], seconds={"evaluate": 10.0, "prepare": 600.0})
    prepared = Spending(Budget(minutes=20), past)
    assert prepared.spent["minutes"] == 11
    assert (prepared.next_size(8), prepared.evaluations_ahead) == (8, 54)


def test_an_llm_is_told_how_many_evaluations_its_questions_make_when_racing_leaves_some_out(
    workspace: Workspace, models: Path
) -> None:
    write_questions(workspace.root, models)
    config = workspace.config(
        heldout=None,
        llm={"proposer": "simulated", "model": "random"},
        search={"budget": {"items": 1200}, "seed": 3, "racing": {"error_rate": 0.4}, "finalists": 0},
    )
    status, printed = workspace.llmevo("run", config, "--out", "run")
    assert status == 0, printed
    events = workspace.events("run")
    told = [
        [*map(int, found)]
        for event in events
        if isinstance(event, Prompted)
        for found in re.findall(r"NOW: (\d+) of (\d+) evaluations", f"{event.messages}")
    ]
    scored = sum(isinstance(event, Evaluated) for event in events)
    assert scored > told[0][1] == 20
    assert [used for used, budget in told if used >= budget] == []
    assert abs(told[-1][1] - scored) <= 3


def test_scores_taken_over_from_elsewhere_count_as_evaluations_and_take_no_time() -> None:
    known = Past([0.0] * 6).state
    assert Spending(Budget(minutes=1), known).next_size(4) == 4
    assert Spending(Budget(evaluations=8, minutes=1), known).next_size(4) == 2


def test_progress_is_that_of_the_kind_nearest_its_end_and_forecasts_go_by_the_mean() -> None:
    ten = Past([6.0] * 10).state
    assert Spending(Budget(evaluations=40), ten).progress == 0.25
    assert Spending(Budget(evaluations=40, minutes=2), ten).progress == 0.5
    assert Spending(Budget(evaluations=40, minutes=2), ten).evaluations_ahead == 10
    assert Spending(Budget(evaluations=40, items=300), ten).evaluations_ahead == 5
    half = {place: replace(trial, score=Score(0.5, 0.0, {}, 10)) for place, trial in ten.trials.items()}
    raced = replace(ten, trials=half)  # racing left half of the questions out
    assert Spending(Budget(evaluations=40, items=300), raced).evaluations_ahead == 20
    assert Budget(items=300).evaluations_of(20) == 15
    assert Budget(evaluations=9, items=300).evaluations_of(20) == 9


def test_it_says_what_is_spent_of_what() -> None:
    ten = Past([6.0] * 10, [prompted(1, cost=0.25)]).state
    assert str(Spending(Budget(evaluations=40), ten)) == "10 of 40 evaluations"
    assert str(Spending(Budget(items=50000, minutes=60, cost=5), ten)) == (
        "10 evaluations, 200 of 50,000 items, 1 of 60 min, 0.25 of 5 cost"
    )


def searched(workspace: Workspace, *words: object, **config: Any) -> RunState:
    """A finished run that was also verified against its log."""
    plain: dict[str, Any] = {"heldout": None, "engine": {"self_check": False}}
    status, printed = workspace.llmevo("run", workspace.config(**{**plain, **config}), "--out", "run", *words)
    assert status == 0, printed
    status, printed = workspace.llmevo("replay", "run", "--verify")
    assert (status, "Verified" in printed) == (0, True), printed
    return workspace.state("run")


@pytest.mark.parametrize(
    ("words", "evaluations"),
    [
        (("--budget", "100, 130 items"), 10),  # of 12 questions each
        (("--budget", "5", "--budget", "1 h"), 5),
    ],
)
def test_the_kind_that_is_spent_first_ends_a_run(
    workspace: Workspace, words: tuple[str, ...], evaluations: int
) -> None:
    state = searched(workspace, *words, "--optimizer", "random")
    assert len(state.trials) == evaluations


def test_a_run_that_ends_by_its_minutes_is_verified_where_it_ended(workspace: Workspace) -> None:
    budget = Budget(minutes=0.01)
    state = searched(workspace, search={"optimizer": "random", "budget": {"minutes": 0.01}, "population": 3})
    assert state.started is not None
    assert state.started.config["search"]["budget"] == {"evaluations": MANY, "minutes": 0.01}
    assert 3 <= len(state.trials) < MANY
    assert Spending(budget, state).next_size(3) == 0


def test_a_run_that_ends_by_its_cost_makes_no_call_that_would_exceed_it(workspace: Workspace) -> None:
    tables = [[[[50 + 5 * i, 47], [33, 61]], [[81 - 5 * i, 22], [56, 14]]] for i in range(9)]
    texts = [json.dumps({"proposals": [{"reason": "so", "genome": table} for table in two]}) for two in tables]
    answers = [chat(text, prompt=1000, completion=1000) for text in texts]  # two each
    search = {"optimizer": "llm", "budget": "60, $5", "population": 3, "seed": 3}
    with serving(Answer({"data": []}), *answers) as server:
        llm = {"proposer": "openai", "base_url": server.url, "price": {"prompt": 1000.0, "completion": 1000.0}}
        state = searched(workspace, search=search, llm=llm)
    assert sum(event.cost for event in state.prompted) == pytest.approx(4.0)
    assert 3 < len(state.trials) < 60


def test_an_llm_is_told_how_many_evaluations_fit_into_the_minutes_once_that_is_known(workspace: Workspace) -> None:
    config = config_in(workspace.root, "llm", 1, search={"budget": {"minutes": 20 * 0.25 / 60}})
    folder = workspace.root / "run"
    carry_on(CountedRig(config, workspace.root), folder)
    state = RunState.fold(iter(read_log(folder)))
    first, *later = [event.messages[-1]["content"] for event in state.prompted]
    assert "\nNOW: 4 evaluations are used; " in first
    assert later
    for text in later:
        told = re.search(r"\nNOW: \d+ of (\d+) evaluations are used, \d+ left; ", text)
        assert told
        assert int(told[1]) <= 20


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ("run", "--budget", "30 items"),
            "30 items is too low; the start rows (the parents, the uniform merge, 1 with another weight",
        ),
        (("run", "--budget", "lots"), "--budget: 'lots' is no amount"),
        (("run", "--budget", "$5"), "prices per million tokens"),
        (("compare", "--budget", "1 h"), "give evaluations or items"),
    ],
)
def test_a_bound_that_cannot_hold_is_refused(workspace: Workspace, words: tuple[str, ...], says: str) -> None:
    command, *options = words
    status, printed = workspace.llmevo(command, workspace.config(), *options)
    assert status == 2, printed
    assert says in printed


def test_a_cost_bounds_nothing_where_no_llm_is_asked(workspace: Workspace) -> None:
    config = workspace.config(llm={"proposer": "local", "price": {"prompt": 1.0}})
    status, printed = workspace.llmevo("run", config, "--budget", "$1", "--optimizer", "random")
    assert status == 2, printed
    assert "'random' asks no LLM" in printed
