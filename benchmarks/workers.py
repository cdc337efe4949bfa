"""Runs with many workers in virtual time: how busy the workers are, and how good the recipe is at equal times.

    python benchmarks/workers.py speed [--seeds 20]         # how much of the workers' time counts
    python benchmarks/workers.py search [--seeds 20]        # the true score of the recipe at equal times
    python benchmarks/workers.py table [FILE]               # Markdown

`speed` and `search` add a line for each scene to the file; what is there is not run again.

It is a discrete-event simulation with the parts of a run: optimizers, start rows, racing, the order of work
(`llmevo.workers.schedule`), and the rule for what is handed over. Candidates answer questions as on a landscape of
`landscapes.py`. A worker is a number of seconds for each job. The unit of time is what one worker needs on average to
ask one candidate all questions; a swap of the weights comes on top.

The orders of asking:

    whole   A generation at a time, and a candidate is scored by one worker from its first to its last question.
    parts   A generation at a time, and the unit of work is a part of the questions.
    strict  The same, and a worker that has nothing to do asks a raced candidate the part after the one that another
            worker asks it now: `search.order: strict`. The answers count if the candidate is not stopped before.
    single  A candidate is asked for when a worker is free.
    steady  The same, and parts ahead where nothing is asked for, among the start rows and in the end:
            `search.order: steady`.
    early   The same, and the first candidates are asked for before the start rows are scored.

A generation has as many candidates as the optimizer wants, and at least one, or with a number behind the order (as
`strict 2`) so many, for each worker.

A candidate's duration is its number of questions times a factor of its own: one drawn from the seconds per question of
a real run (`quickstart`), or log-normal with a standard deviation of 0.5 or 1, like tasks with written replies. With
`unequal` machines, half of the workers take twice as long. A part of the questions is a fifth of them.
"""

import argparse
import heapq
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import asking
import measurements
import numpy as np
import searches
import tables
from numpy.typing import NDArray

from llmevo.config import Racing
from llmevo.config import Search as SearchConfig
from llmevo.evaluation.questions import blocks
from llmevo.evaluation.racing import difference, is_beaten
from llmevo.evaluation.score import Score, aggregate, concatenate
from llmevo.evaluation.tasks.task import Task
from llmevo.llm.templates import Templates
from llmevo.run.log.storage import read_log
from llmevo.search.optimizers import OPTIMIZERS, Optimizer, Setup, recommend
from llmevo.search.optimizers.base import Asking, answered
from llmevo.search.start_rows import usual_rows
from llmevo.search.trial import Candidate, Suggestion, Trial
from llmevo.workers.protocol import Job, Notice, Request, Result
from llmevo.workers.schedule import Schedule

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "workers.jsonl"
LOG = HERE / "results" / "quickstart-llm" / "seed-2.jsonl"
"""A run whose seconds are those of `quickstart`."""
LANDSCAPE = "quickstart"
QUESTIONS = 64
"""Of each task, as in the quickstart."""
UNEQUAL = 0.5
"""The speed of half of the machines."""
GENERATIONS = 10
"""Candidates for each worker in `speed`, after the start rows."""
TIMES = (2.5, 5.0, 10.0, 20.0)
"""When it is seen what a search has found, in evaluations of all questions by one worker."""
COUNTS = (20, 40, 80, 160, 320)
"""The same, in candidates."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Scene:
    """A run before it is simulated, but for its seed."""

    order: str
    workers: int
    optimizer: str
    durations: str = "quickstart"
    machines: str = "equal"
    swap: float = 0.05
    """The time of a swap, in the average time of a part."""
    racing: bool = True
    asking: float = 0.0
    """The time in which the optimizer makes a candidate, in evaluations of all questions."""

    @property
    def kind(self) -> str:
        return self.order.partition(" ")[0]

    @property
    def at_once(self) -> int:
        """The candidates in a generation, at least."""
        return int(self.order.partition(" ")[2] or 1) * self.workers

    @property
    def speeds(self) -> list[float]:
        return [UNEQUAL if self.machines == "unequal" and place % 2 else 1.0 for place in range(self.workers)]


# The orders of work


class Whole(Schedule):
    """A candidate is scored by one worker."""

    def job_for(self, worker: str, ahead: bool = False) -> Job | None:
        held = self._open.get(self._holds.get(worker, ""))
        chosen = held or next((each for each in self._open.values() if not each.is_begun), None)
        if chosen is None or (part := chosen.next_part) is None:
            return None
        chosen.asked[part] = 0
        self._holds[worker] = chosen.request.id
        return Job(chosen.request.id, chosen.request.recipe, chosen.request.questions, part)


AHEAD = ("strict", "steady", "early")
STEADY = ("single", "steady", "early")


# The questions


class Questions:
    """The answers of candidates on a landscape, part by part: see `llmevo.workers.protocol.Scoring`."""

    def __init__(self, seed: int, racing: Racing | None, timeless: bool) -> None:
        """`timeless`: candidates and rivals do not depend on time, and are remembered."""
        self._timeless = timeless
        self._landscape = searches.load(LANDSCAPE)
        self._examiner = searches.Examiner(self._landscape, QUESTIONS, "fixed", seed)
        self.weights = self._examiner.weights
        self._tasks = [Task(name=name, weight=weight, metric=metric) for name, (weight, metric) in self.weights.items()]
        self._shares = {name: weight for name, (weight, _) in self.weights.items()}
        self._racing = racing
        self._looks = Racing().looks
        self._blocks = blocks({name: range(QUESTIONS) for name in self.weights}, self._looks)
        self.items = QUESTIONS * len(self.weights)
        self._answers: dict[int | str, Mapping[str, Sequence[float]]] = {}
        self._truths: dict[int, float] = {}
        self._scores: dict[tuple[int | str, int], Score] = {}
        self._stopped: dict[tuple[int | str, int], Score | None] = {}
        self.asked: list[list[Suggestion]] = []
        """The candidates of the generations, where they do not depend on time."""

    def know(self, number: int, point: Array) -> float:
        """Draw the answers of a candidate, and return its true score."""
        if number not in self._truths:
            self._answers[number] = self._examiner.scores(point[None])[0].item_scores
            self._truths[number] = float(self._landscape.truth(point[None])[0])
        return self._truths[number]

    def part(self, number: int | str, part: int) -> Score:
        """The score on one part of the questions."""
        if (number, part) not in self._scores:
            self._scores[number, part] = self._part(number, part)
        return self._scores[number, part]

    def _part(self, number: int | str, part: int) -> Score:
        answers = {
            name: [self._answers[number][name][place] for place in places]
            for name, places in self._blocks[part].items()
        }
        results = {name: {searches.METRIC: float(np.mean(own))} for name, own in answers.items()}
        score = aggregate(self._tasks, results, sum(map(len, answers.values())), answers)
        return replace(score, item_scores=answers)

    # For the schedule

    def known(self, request: Request) -> Score | None:
        return None

    def parts(self, questions: str) -> list[int]:
        return [sum(map(len, block.values())) for block in self._blocks]

    def is_raced(self, request: Request) -> bool:
        return bool(self._racing and request.rivals)

    def asks_judges(self, questions: str) -> bool:
        return False

    def join(self, questions: str, parts: Sequence[Score]) -> Score:
        return concatenate(self._tasks, parts)

    def stopped(self, request: Request, score: Score) -> Score | None:
        if not self._timeless:
            return self._judged(request, score)
        key = request.id, score.items
        if key not in self._stopped:
            self._stopped[key] = self._judged(request, score)
        return self._stopped[key]

    def _judged(self, request: Request, score: Score) -> Score | None:
        assert self._racing
        field = [rival.item_scores for rival in request.rivals]
        look = int(np.searchsorted(np.cumsum(self.parts("")), score.items)) + 1
        gap = difference(score.item_scores, field[0], self._shares).mean
        beaten = is_beaten(score.item_scores, field, self._shares, look, self._looks, self._racing.error_rate)
        return replace(score, total=request.rivals[0].total + gap) if beaten else None

    def keep(self, request: Request, score: Score) -> None:
        """Do nothing: no candidate is asked twice."""


@cache
def questions_of(optimizer: str, at_once: int, racing: bool, seed: int) -> Questions:  # noqa: ARG001
    """The questions of a search, which scenes share where its candidates do not depend on time. `at_once` is the size
    of its generations, 0 where there are none.
    """
    return Questions(seed, Racing() if racing else None, timeless=bool(at_once))


# The workers


@cache
def paces() -> list[float]:
    """The seconds a question of the candidates of a real run, with a mean of 1."""
    events = [event for event in read_log(LOG) if event.event == "evaluated" and event.seconds]
    found = np.array([event.seconds["evaluate"] / event.items for event in events])  # type: ignore[attr-defined]
    return (found / found.mean()).tolist()


def pace(durations: str, seed: int, number: int) -> float:
    """How long a candidate takes, against the average."""
    random = np.random.default_rng([seed, number])
    if durations == "quickstart":
        return float(random.choice(paces()))
    variance = np.log1p(float(durations) ** 2)
    return float(np.exp(np.sqrt(variance) * random.standard_normal() - variance / 2))


@dataclass
class Fleet:
    """Workers in virtual time: see `llmevo.workers.protocol.Workers`."""

    scene: Scene
    questions: Questions
    seed: int
    now: float = 0.0
    spans: list[tuple[float, float, float]] = field(default_factory=list[tuple[float, float, float]])
    """Beginning, end and speed of all jobs."""
    swaps: int = 0
    asked: int = 0
    """Questions."""

    def __post_init__(self) -> None:
        self.observe: Callable[[Notice], None] = lambda _: None
        self._schedule = (Whole if self.scene.kind == "whole" else Schedule)(self.questions)
        self._speeds = self.scene.speeds
        self._holds: dict[int, int | str] = {}
        self._busy: list[tuple[float, int, Job]] = []
        self._idle = [*range(self.scene.workers)]
        self._results: deque[Result] = deque()
        self.ended: dict[int | str, float] = {}
        """When results came."""
        self._clock = 0.0

    @property
    def swap(self) -> float:
        return self.scene.swap / len(self.questions.parts(""))

    def submit(self, request: Request) -> None:
        self._take(self._schedule.add(request))
        self._clock = max(self._clock, self.now)
        self._hand_out()

    def result(self) -> Result:
        ahead = self.scene.kind in AHEAD
        if not self._results:
            self._hand_out(ahead)
        while not self._results:
            self._step(ahead)
        result = self._results.popleft()
        self.now = max(self.now, self.ended[result.id])
        return result

    def wait(self, until: float) -> None:
        """Let the workers go on until a time, while the optimizer thinks."""
        while self._busy and self._busy[0][0] <= until:
            self._step()
        self.now = until

    def _step(self, ahead: bool = False) -> None:
        """The next end of a job. Parts are asked ahead only while the run waits for a result."""
        self._clock, worker, job = heapq.heappop(self._busy)
        self._idle.append(worker)
        score = self.questions.part(job.id, job.part)
        self._take(self._schedule.answered(str(worker), job, score, {}))
        for result in self._schedule.further():
            self._take(result)
        self._hand_out(ahead and not self._results)

    def _take(self, result: Result | None) -> None:
        if result:
            self.ended[result.id] = self._clock
            self._results.append(result)

    def _hand_out(self, ahead: bool = False) -> None:
        for worker in sorted(self._idle):
            if job := self._schedule.job_for(str(worker), ahead):
                self._idle.remove(worker)
                count = self.questions.parts("")[job.part]
                work = count / self.questions.items * pace(self.scene.durations, self.seed, int(job.id))
                if self._holds.get(worker) != job.id:
                    self.swaps += 1
                    work += self.swap
                self._holds[worker] = job.id
                self.asked += count
                end = self._clock + work / self._speeds[worker]
                self.spans.append((self._clock, end, self._speeds[worker]))
                heapq.heappush(self._busy, (end, worker, job))

    def work(self, begin: float, end: float) -> float:
        """What was worked in a span of time, in the time of a worker of speed 1."""
        return sum(max(0.0, min(to, end) - max(since, begin)) * speed for since, to, speed in self.spans)


# A run


class Run:
    """A search with many workers."""

    def __init__(self, scene: Scene, seed: int, budget: int, horizon: float = np.inf) -> None:
        """It ends after `budget` candidates, or at the time `horizon`."""
        self.scene, self._seed, self._budget, self._horizon = scene, seed, budget, horizon
        self._space = searches.load(LANDSCAPE).space
        at_once = 0 if scene.kind in STEADY else scene.at_once
        learns = not at_once and scene.optimizer not in ("near", "random")
        questions = questions_of.__wrapped__ if learns else questions_of
        self.questions = questions(scene.optimizer, at_once, scene.racing, seed)
        self.fleet = Fleet(scene, self.questions, seed)
        self.rows = usual_rows(self._space)
        self._setup = Setup(self._space, seed, budget, self.questions.weights, "", Templates(), parallel=scene.at_once)
        self._optimizer = self._made()
        self._heard: list[list[Trial]] = []
        """What a search by generations has not told its optimizer yet."""
        self._generation = 0
        self._size = max(SearchConfig().population_of(len(self._space.genes)), scene.at_once)
        self._candidates: list[Candidate] = []
        self._truths: list[float] = []
        self.trials: dict[int, Trial] = {}
        """In the order in which they came."""
        self._complete: dict[int, Score] = {}
        """Of candidates that were asked all questions."""
        self.started = self.last_asked = 0.0

    def _made(self) -> Optimizer:
        return {**OPTIMIZERS, "near": Near}[self.scene.optimizer](self._setup)

    @property
    def ended(self) -> float:
        return max(self.fleet.ended.values())

    def search(self) -> "Run":
        first, *others = self._new(self.rows[: self._budget])
        self._submit([first])
        self._take()
        self._submit(others)
        waiting = set(others)
        if self.scene.kind != "early":
            self._start(waiting)
        if self.scene.kind in STEADY:
            self._search_steadily(waiting)
        else:
            while (size := min(self._size, self._left)) > 0:
                numbers = self._new(self._next_generation(size))
                self._submit(numbers)
                for _ in numbers:
                    self._take()
                self._told(numbers)
        return self

    def _start(self, waiting: set[int]) -> None:
        """Take the scores of the start rows, and tell the optimizer of them."""
        while waiting:
            waiting.remove(self._take())
        self._told(range(len(self.rows)))
        self.started = self.last_asked = self.fleet.now

    def _search_steadily(self, waiting: set[int]) -> None:
        early: list[int] = []
        while True:
            free = self.scene.workers - len(waiting)
            if free > 0 and (size := min(free, self._left)) > 0:
                self._optimizer.expect([self._candidates[number].suggestion for number in sorted(waiting)])
                numbers = self._ask(size)
                self._submit(numbers)
                waiting |= {*numbers}
            elif waiting:
                waiting.remove(number := self._take())
                if self.started:
                    self._told([number])
                elif number >= len(self.rows):
                    early.append(number)
                elif min(waiting, default=len(self.rows)) >= len(self.rows):
                    self._told(range(len(self.rows)))
                    self._told(early)
                    self.started = self.fleet.now
            else:
                return

    @property
    def _left(self) -> int:
        return self._budget - len(self._candidates) if self.fleet.now < self._horizon else 0

    def _ask(self, size: int) -> list[int]:
        suggestions = answered(self._optimizer.ask(size), asking.refused)
        self.fleet.wait(self.fleet.now + self.scene.asking * len(suggestions))
        self.last_asked = self.fleet.now
        return self._new(suggestions)

    def _next_generation(self, size: int) -> list[Suggestion]:
        """The next generation, from the memory or from the optimizer."""
        known = self.questions.asked
        if self._generation == len(known):
            for place, trials in enumerate(self._heard):
                self._optimizer.tell(trials)
                if place < len(self._heard) - 1:
                    answered(self._optimizer.ask(size), asking.refused)
            known.append(answered(self._optimizer.ask(size), asking.refused))
            self._heard = []
        suggestions = known[self._generation][:size]
        self._generation += 1
        self.fleet.wait(self.fleet.now + self.scene.asking * len(suggestions))
        self.last_asked = self.fleet.now
        return suggestions

    def _new(self, suggestions: Sequence[Suggestion]) -> list[int]:
        first = len(self._candidates)
        for number, one in enumerate(suggestions, start=first):
            self._candidates.append(Candidate(number, 0, one.origin, one.genes, one.note, one.expected))
            self._truths.append(self.questions.know(number, self._space.to_unit(one.genes)))
        return [*range(first, len(self._candidates))]

    def _submit(self, numbers: Sequence[int]) -> None:
        rivals = [score for _, score in sorted(self._complete.items(), key=lambda one: (-one[1].total, one[0]))]
        for number in numbers:
            self.fleet.submit(Request(number, self._space.decode(self._candidates[number].genes), rivals=rivals))

    def _take(self) -> int:
        result = self.fleet.result()
        assert result.score
        number = int(result.id)
        self.trials[number] = Trial(self._candidates[number], result.score)
        if result.score.items == self.questions.items:
            arrays: Any = {name: np.array(own) for name, own in result.score.item_scores.items()}  # faster to race with
            self._complete[number] = replace(result.score, item_scores=arrays)
        return number

    def _told(self, numbers: Iterable[int]) -> None:
        trials = [self.trials[number] for number in numbers]
        inside = [trial for trial in trials if self._space.contains(trial.candidate.genes)]
        if self.scene.kind in STEADY:
            self._optimizer.tell(inside)
        else:
            self._heard.append(inside)

    # Afterwards

    def handed(self, trials: Sequence[Trial]) -> float:
        """The true score of what would be handed over after these trials."""
        picked = recommend(self._space, [trial for trial in trials if self._space.contains(trial.candidate.genes)])
        return self._truths[picked.candidate.id] if picked else np.nan

    def at_time(self, moment: float) -> list[Trial]:
        return [trial for number, trial in self.trials.items() if self.fleet.ended[number] <= moment]

    @property
    def needed(self) -> float:
        """The time that one worker would have needed for the same candidates and the same answers."""
        times = [
            trial.score.items / self.questions.items * pace(self.scene.durations, self._seed, number)
            for number, trial in self.trials.items()
            if trial.score
        ]
        return sum(times) + self.fleet.swap * len(times)

    def speed(self) -> dict[str, float]:
        """The throughput as a multiple of one worker's, and where the workers' time went, in shares of it.

        `middle` is the throughput from when the start rows are scored until the last candidate is asked for, with the
        same share of the work in vain as in the whole run.
        """
        fleet, end, total = self.fleet, self.ended, sum(self.scene.speeds)
        worked = fleet.work(0, end)
        before, between = fleet.work(0, self.started), fleet.work(self.started, self.last_asked)
        after = worked - before - between
        span = self.last_asked - self.started
        counted = sum(trial.score.items for trial in self.trials.values() if trial.score)
        capacity = total * end
        return {
            "multiple": self.needed / end,
            "middle": between / span * self.needed / worked if span else np.nan,
            "idle first": (total * self.started - before) / capacity,
            "idle between": (total * span - between) / capacity,
            "idle last": (total * (end - self.last_asked) - after) / capacity,
            "swaps": (fleet.swaps - len(self.trials)) * fleet.swap / capacity,
            "unused": (fleet.asked - counted) / fleet.asked,
            "asked": counted / self.questions.items / len(self.trials),
        }


class Near(Optimizer):
    """Random points around the best one: what a search asks for that has found its way, without a search's time."""

    is_steady = True
    radius = 0.1

    def __init__(self, setup: Setup) -> None:
        self._space, self._random = setup.space, np.random.default_rng(setup.seed)
        self._best = searches.load(LANDSCAPE).optimum[0]

    def ask(self, size: int) -> Asking:
        points = self._best + self.radius * self._random.standard_normal((size, len(self._best)))
        return [Suggestion(self._space.from_unit(point), "near") for point in np.clip(points, 0.0, 1.0)]
        yield  # makes this a generator, as Asking is

    def expect(self, pending: Sequence[Suggestion]) -> None:
        """Do nothing: no point depends on another."""

    def tell(self, trials: Sequence[Trial]) -> None:
        """Learn nothing."""

    def state(self) -> str:
        return ""


# The commands

ORDERS = ("whole", "parts", "parts 2", "strict", "strict 2", "single", "steady", "early")
MAIN = ("strict", "parts", "single", "steady")


def speeds() -> Iterator[Scene]:
    """The scenes of `speed`: one that is like the quickstart, and one for each thing that makes it harder."""
    base = Scene("", 0, "near")
    hard = {"durations": "1", "machines": "unequal", "swap": 0.3}
    other: list[dict[str, Any]] = [
        {"durations": "1"},
        {"durations": "0.5"},
        {"machines": "unequal"},
        {"swap": 0.3},
        {"racing": False},
        {"racing": False, "durations": "1"},
        {"asking": 0.1},
    ]
    yield from (replace(base, order=order, workers=workers) for workers in (8, 32) for order in MAIN)
    yield from (replace(base, order=order, workers=8, **hard) for order in MAIN)
    yield from (replace(base, order=order, workers=32, **hard) for order in MAIN)
    for changes in other:
        yield from (replace(base, order=order, workers=8, **changes) for order in MAIN)
    for workers in (8, 2, 32):
        yield from (replace(base, order=order, workers=workers) for order in ORDERS)
    yield from (replace(base, order=order, workers=128) for order in MAIN)


HORIZONS = {1: 20.0, 2: 20.0, 8: 10.0, 32: 5.0, 128: 2.5}
"""The length of the searches of so many workers."""


def found() -> Iterator[Scene]:
    """The scenes of `search`."""
    yield Scene("strict", 1, "llm-off")
    yield from (Scene(order, 8, "llm-off") for order in MAIN)
    yield from (Scene(order, 32, "llm-off") for order in ("steady", "strict", "parts", "single"))
    yield from (Scene(order, 8, "llm-off") for order in ("strict 2", "parts 2", "early"))
    yield from (Scene("strict", 1, optimizer) for optimizer in ("cma-es", "random"))
    yield from (Scene(order, 8, "cma-es") for order in ("strict", "parts", "strict 2"))
    yield from (Scene(order, 8, "random") for order in ("parts", "steady"))
    yield from (Scene(order, 2, "llm-off") for order in MAIN)
    hard = {"durations": "1", "machines": "unequal", "swap": 0.3}
    yield from (Scene(order, 8, "llm-off", **hard) for order in MAIN)
    yield from (Scene(order, 32, "llm-off") for order in ("early", "strict 2"))
    yield from (Scene(order, 32, "cma-es") for order in ("strict", "parts", "strict 2"))
    yield from (Scene(order, 32, "random") for order in ("parts", "steady"))


def speed(scene: Scene, seed: int) -> dict[str, Any]:
    run = Run(scene, seed, len(usual_rows(searches.load(LANDSCAPE).space)) + GENERATIONS * scene.workers)
    return run.search().speed()


def search(scene: Scene, seed: int) -> dict[str, Any]:
    """What the search has found by several times and after several candidates."""
    horizon = HORIZONS[scene.workers]
    run = Run(scene, seed, 100 * scene.workers, horizon).search()
    trials = [*run.trials.values()]
    times = [moment for moment in TIMES if moment <= horizon]
    counts = [number for number in COUNTS if number <= len(trials)]
    return {
        "times": {f"{moment:g}": run.handed(run.at_time(moment)) for moment in times},
        "scored": {f"{moment:g}": len(run.at_time(moment)) for moment in times},
        "counts": {str(number): run.handed(trials[:number]) for number in counts},
        **run.speed(),
    }


COMMANDS: dict[str, tuple[Callable[[], Iterator[Scene]], Callable[[Scene, int], dict[str, Any]]]] = {
    "speed": (speeds, speed),
    "search": (found, search),
}


def simulate(options: argparse.Namespace) -> None:
    """Add the lines that the file lacks: for each scene the results of all seeds."""
    scenes, measure = COMMANDS[options.of]
    done = [(line["of"], line["scene"], line["seeds"]) for line in measurements.read(options.out)]
    for scene in dict.fromkeys(scenes()):
        if options.workers not in (None, scene.workers):
            continue
        key = (options.of, asdict(scene), options.seeds)
        if key in done:
            continue
        runs = [measure(scene, seed) for seed in range(options.seeds)]
        line = {"of": options.of, "scene": asdict(scene), "seeds": options.seeds, "runs": _joined(runs)}
        measurements.append(options.out, line)
        print(*key, flush=True)


def _joined(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of every figure the values of all runs; those that some lack, such as of many candidates, are left out."""
    common = [name for name in runs[0] if all(name in run for run in runs)]
    return {
        name: _joined([run[name] for run in runs])
        if isinstance(runs[0][name], Mapping)
        else [float(f"{run[name]:.4g}") for run in runs]
        for name in common
    }


# Tables


def table(options: argparse.Namespace) -> None:
    """Print the lines of the file."""
    lines = [{**line, "scene": Scene(**line["scene"])} for line in measurements.read(options.file)]
    seeds = sorted({line["seeds"] for line in lines if line["of"] == "speed"})
    parts = [
        f"{' or '.join(map(str, seeds))} seeds where no other number stands; means and their standard errors.",
        "\n".join(_speeds([line for line in lines if line["of"] == "speed"])),
        "\n".join(_losses([line for line in lines if line["of"] == "speed"])),
        "\n".join(_found([line for line in lines if line["of"] == "search"])),
    ]
    print("\n\n".join(parts))


def _speeds(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "Throughput as a multiple of one worker's; in brackets, from the start rows to the last candidate asked for:"
    yield ""
    orders = [order for order in ORDERS if any(line["scene"].order == order for line in lines)]
    by_scene: dict[Scene, dict[str, Any]] = {}
    for line in lines:
        by_scene.setdefault(replace(line["scene"], order=""), {})[line["scene"].order] = line["runs"]
    yield from tables.rows(
        ["workers", "at most", "durations", *orders],
        (
            [
                str(scene.workers),
                f"{sum(scene.speeds):g}",
                _described(scene),
                *(
                    f"{tables.with_error(own[o]['multiple'], digits=1)} ({np.mean(own[o]['middle']):.1f})"
                    if o in own
                    else ""
                    for o in orders
                ),
            ]
            for scene, own in sorted(by_scene.items(), key=lambda one: (one[0].workers, _described(one[0])))
        ),
    )


def _losses(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "Where the workers' time went, in per cent of it, with the durations of the quickstart:"
    yield ""
    plain = [line for line in lines if line["scene"] == Scene(line["scene"].order, line["scene"].workers, "near")]
    kinds = {
        "idle among the start rows": "idle first",
        "idle in the search": "idle between",
        "idle in the end": "idle last",
        "further swaps": "swaps",
    }
    cells: list[list[str]] = []
    for line in sorted(plain, key=lambda one: (one["scene"].workers, ORDERS.index(one["scene"].order))):
        scene, runs = line["scene"], line["runs"]
        shares = {head: 100 * float(np.mean(runs[name])) for head, name in kinds.items()}
        counted = 100 * float(np.mean(runs["multiple"])) / scene.workers
        vain = max(0.0, 100 - counted - sum(shares.values()))
        cells.append([str(scene.workers), scene.order, *(f"{one:.0f}" for one in (counted, *shares.values(), vain))])
    yield from tables.rows(["workers", "order", "counted", *kinds, "answers in vain"], cells)


def _found(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "True score of what is handed over at a time, with the candidates scored by then, and after some candidates:"
    yield ""
    heads = [*(f"at {moment:g}" for moment in TIMES), *(f"of {count}" for count in COUNTS[:-1])]
    cells: list[list[str]] = []

    def place(line: Mapping[str, Any]) -> tuple[Any, ...]:
        scene = line["scene"]
        return _described(scene), scene.optimizer, scene.workers, ORDERS.index(scene.order)

    for line in sorted(lines, key=place):
        scene, runs = line["scene"], line["runs"]
        times = [
            f"{tables.with_error(own)} ({np.mean(runs['scored'][f'{moment:g}']):.0f})"
            if (own := runs["times"].get(f"{moment:g}"))
            else ""
            for moment in TIMES
        ]
        counts = [tables.with_error(own) if (own := runs["counts"].get(str(count))) else "" for count in COUNTS[:-1]]
        what = [_described(scene), scene.optimizer, str(scene.workers), scene.order, str(line["seeds"])]
        throughput = f"{tables.with_error(runs['multiple'], digits=1)} ({np.mean(runs['middle']):.1f})"
        cells.append([*what, throughput, *times, *counts])
    yield from tables.rows(["durations", "optimizer", "workers", "order", "seeds", "throughput", *heads], cells)


def _described(scene: Scene) -> str:
    parts = [scene.durations if scene.durations == "quickstart" else f"log-normal, {scene.durations}"]
    parts += ["unequal machines"] if scene.machines == "unequal" else []
    parts += [f"swap {scene.swap:.0%}"] if scene.swap != Scene("", 0, "").swap else []
    parts += [] if scene.racing else ["not raced"]
    parts += [f"asking takes {scene.asking:g}"] if scene.asking else []
    parts += [scene.optimizer] if scene.optimizer == "llm-off" and not scene.order else []
    return ", ".join(parts)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(required=True)
    for name in COMMANDS:
        simulating = commands.add_parser(name, help="simulate the scenes that the file lacks")
        simulating.add_argument("--seeds", type=int, default=20)
        simulating.add_argument("--workers", type=int, help="only the scenes with so many")
        simulating.add_argument("--out", type=Path, default=RESULTS)
        simulating.set_defaults(command=simulate, of=name)
    showing = commands.add_parser("table", help="print the results")
    showing.add_argument("file", nargs="?", type=Path, default=RESULTS)
    showing.set_defaults(command=table)
    return made


def main(words: Sequence[str] | None = None) -> None:
    options = parser().parse_args(words)
    options.command(options)


if __name__ == "__main__":
    main()
