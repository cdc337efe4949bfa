"""The orders `strict` and `steady`: scores that arrive in any order, and logs of them that are resumed and verified."""

import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from llmevo.config import Budget
from llmevo.errors import ConfigError, MachineError, RunError
from llmevo.run import loop
from llmevo.run.log import events
from llmevo.run.log.storage import LOG, RunLog, holds_run, read_log
from llmevo.run.spending import Spending
from llmevo.run.verify import verify
from llmevo.workers.protocol import Notice, Request, Result
from support import resumable
from support.workspace import write_task

WORKERS, BUDGET = 3, 24


@dataclass
class Shuffled:
    """Workers in this process whose results arrive in a random order; after `lives` results the machine is lost."""

    scorer: "ShuffledRig"
    random: random.Random
    count: int = WORKERS
    lives: int | None = None
    open: list[Request] = field(default_factory=list[Request])
    observe: Callable[[Notice], None] = lambda _: None

    @property
    def free(self) -> int:
        return max(0, self.count - len(self.open))

    def submit(self, request: Request) -> None:
        assert request.id not in [other.id for other in self.open]
        self.open.append(request)

    def result(self) -> Result:
        if self.lives is not None and (left := self.lives) >= 0:
            self.lives = left - 1
            if not left:
                raise MachineError("the last worker is lost")
        chosen = self.open.pop(self.random.randrange(min(self.count, len(self.open))))
        score, seconds = self.scorer.score(chosen.recipe, chosen.questions, chosen.rivals)
        return Result(chosen.id, score, seconds=seconds, workers={"1": score.items})

    def close(self) -> None:
        self.open.clear()


@dataclass
class ShuffledRig(resumable.CountedRig):
    seed: int = 0
    lives: int | None = None

    @cached_property
    def workers(self) -> Any:
        return Shuffled(self, random.Random(self.seed), lives=self.lives)


Make = Callable[..., tuple[ShuffledRig, Path]]


@pytest.fixture
def make(tmp_path: Path, models: Path) -> Make:
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    for shift, name in enumerate(("letters", "letters_heldout")):
        write_task(tmp_path, name, shift)

    def rig(optimizer: str, order: str, seed: int = 0, **options: Any) -> tuple[ShuffledRig, Path]:
        config = resumable.config_in(tmp_path, optimizer, BUDGET)
        search = config.search.model_copy(update={"order": order})
        engine = config.engine.model_copy(update={"workers": WORKERS})
        config = config.model_copy(update={"search": search, "engine": engine})
        return ShuffledRig(config, tmp_path, seed=seed, **options), tmp_path / f"{optimizer}-{order}-{seed}"

    return rig


def carried(rig: ShuffledRig, folder: Path) -> list[events.Event]:
    """Begin the run or go on with it, and return its log."""
    with RunLog(folder, resume=holds_run(folder)) as log:
        experiment = resumable.bench_of(rig, log.recorded)
        try:
            loop.carry_on(experiment, log)
        finally:
            rig.close()
    return read_log(folder)


def of_kind(log: list[events.Event], kind: type[Any]) -> list[Any]:
    return [event for event in log if isinstance(event, kind)]


def check_whole(log: list[events.Event], folder: Path) -> None:
    """Every candidate is scored and told once, and the log follows from its config."""
    scored = Counter(event.candidate for event in of_kind(log, events.Evaluated))
    told = Counter(number for event in of_kind(log, events.Told) for number in event.candidates)
    assert set(told.values()) == {1}
    assert told.keys() == scored.keys() == {*range(BUDGET)}
    assert verify(log, folder)


@pytest.mark.parametrize("optimizer", ["random", "llm-off", "llm"])
def test_a_steady_run_tells_each_score_alone_and_verifies(make: Make, optimizer: str) -> None:
    rig, folder = make(optimizer, "steady")
    log = carried(rig, folder)
    check_whole(log, folder)
    assert all(len(event.candidates) == 1 for event in of_kind(log, events.Told)[1:])
    arrived = [event.candidate for event in of_kind(log, events.Evaluated)]
    assert arrived != sorted(arrived)


def test_a_steady_search_has_no_more_candidates_open_than_workers(make: Make) -> None:
    rig, folder = make("llm-off", "steady", seed=1)
    open_, most = 0, 0
    for event in carried(rig, folder):
        match event:
            case events.Asked():
                open_ += len(event.candidates)
                most = max(most, open_) if event.generation else most
            case events.Evaluated():
                open_ -= 1
            case _:
                pass
    assert most == WORKERS


@pytest.mark.parametrize("order", ["strict", "steady"])
def test_a_run_that_stops_after_any_score_goes_on_and_verifies(make: Make, order: str) -> None:
    for lives in range(1, BUDGET, 5):
        rig, folder = make("llm-off", order, seed=lives, lives=lives)
        with pytest.raises(MachineError):
            carried(rig, folder)
        stopped = read_log(folder)
        assert len(of_kind(stopped, events.Evaluated)) == lives
        rig.lives = None
        log = carried(rig, folder)
        assert log[: len(stopped)] == stopped
        check_whole(log, folder)


def test_a_steady_log_that_ends_anywhere_is_verified_as_far_as_it_goes_and_continued(make: Make) -> None:
    rig, folder = make("llm", "steady")
    carried(rig, folder)
    lines = (folder / LOG).read_bytes().splitlines(keepends=True)
    for count in range(2, len(lines), 7):
        part = folder.with_name(f"part-{count}")
        part.mkdir()
        (part / LOG).write_bytes(b"".join(lines[:count]))
        assert verify(read_log(part), part) is False
        check_whole(carried(rig, part), part)


def test_in_strict_order_candidates_do_not_depend_on_the_order_of_arrival(make: Make) -> None:
    def facts(log: list[events.Event]) -> list[Any]:
        apart = {"time", "seconds", "workers"}
        kept = [event.model_dump(exclude=apart) for event in log if not isinstance(event, events.Evaluated)]
        return kept + sorted((e.model_dump(exclude=apart) for e in of_kind(log, events.Evaluated)), key=str)

    for optimizer in ("llm-off", "cma-es", "llm"):
        logs = [carried(*make(optimizer, "strict", seed)) for seed in (0, 1, 2)]
        assert facts(logs[0]) == facts(logs[1]) == facts(logs[2])


def test_an_edited_order_of_scores_is_found(make: Make) -> None:
    rig, folder = make("llm-off", "steady")
    log = carried(rig, folder)
    first = next(event for event in of_kind(log, events.Asked) if event.generation).candidates  # asked at once
    numbers = {candidate["id"] for candidate in first}
    one, other, *_ = [p for p, e in enumerate(log) if isinstance(e, events.Evaluated) and e.candidate in numbers]
    lines = (folder / LOG).read_text().splitlines(keepends=True)
    lines[one], lines[other] = lines[other], lines[one]
    (folder / LOG).write_text("".join(lines))
    with pytest.raises(RunError, match="does not follow from its config"):
        verify(read_log(folder), folder)


def test_an_optimizer_that_learns_from_generations_is_refused_in_steady_order(make: Make) -> None:
    rig, _ = make("cma-es", "steady")
    with pytest.raises(ConfigError, match=r"search\.order: steady .* 'cma-es' .* llm-off"):
        resumable.bench_of(rig, []).check()


def test_minutes_count_what_was_scored_at_the_same_time_once(make: Make) -> None:
    rig, folder = make("random", "strict")
    log = carried(rig, folder)
    state = loop.RunState.fold(iter(log))
    spent = Spending(Budget(minutes=5), state).spent["seconds"]
    assert spent == state.busy < 0.25 * BUDGET  # each says that it took 0.25 s; they all took less
