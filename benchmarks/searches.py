"""Searches on simulated landscapes: llmevo's optimizers and other libraries', under the same rules.

    python benchmarks/searches.py run --landscape quickstart,many --optimizers llm-off,cma-es,botorch --seeds 20
    python benchmarks/searches.py run --landscape quickstart --optimizers llm@http://localhost:8000/v1 --model NAME \\
        --transcript FILE                                  # a real LLM; its replies are kept in FILE
    python benchmarks/searches.py run --landscape quickstart --optimizers llm@NAME --recorded FILE   # the same again
    python benchmarks/searches.py run --landscape quickstart --optimizers llm@NAME+once --recorded FILE   # once
    python benchmarks/searches.py table [FILE]             # Markdown
    python benchmarks/searches.py summary [FILE]           # one table of several landscapes
    python benchmarks/searches.py proposals [FILE]         # the true scores of what LLMs proposed
    python benchmarks/searches.py draw                     # those of random recipes, to compare them with
    python benchmarks/searches.py picture [FILE] --out PICTURE.png

`run` adds a line for each search to the file. What is there is not run again, unless the optimizer or the landscape has
changed since; then the new line counts, and the old one is removed at the end of `run`. Landscapes are those of
`landscapes.py`, and `simulator`, that of `simulator.py`. An optimizer is a name of `OPTIMIZERS`
(`llmevo/search/optimizers`) or of `RIVALS` (`rivals.py`); `llm:POLICY` has a simulated LLM
(`llmevo/search/simulated_llm.py`), and `llm@URL` asks a server, with `--masked` without names (`llm@NAME+masked`), with
`--short` in the short form for small models (`llm@NAME+short`).
`llm@NAME+once` has what a recorded LLM answered before any score, its recipes and beliefs, and no further answer.
`llm-off+model_stock` has Model Stock's weights as a prior (`search.prior`).

The rules are those of a run: the same start rows for every optimizer, generations of the config's default size, one
rule for what is handed over (`llmevo.search.optimizers.recommend`). With `--questions N` a candidate is asked N
questions of every task: the same for all candidates of a search with `--mode fixed`, other ones for each with
`--mode fresh`. With `--mode finals` they are the same, and at the end as many further questions choose among the
finalists, as in a run: each finalist counts as an evaluation. With `--questions 0` its score is the true one, without
noise. A line has the true score of the candidate that would be handed over after some numbers of evaluations, and of
the best-scored one.
"""

import argparse
import ast
import hashlib
import inspect
import json
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, Protocol

import measurements
import numpy as np
import tables
from measurements import QUICKSTART
from numpy.typing import NDArray
from rivals import RIVALS, rival

from llmevo.config import Search as SearchConfig
from llmevo.config import read_config
from llmevo.errors import ProposerError
from llmevo.evaluation.score import Score, aggregate
from llmevo.evaluation.tasks.task import Task
from llmevo.llm.client import Client, Connection, Reply, read_key
from llmevo.llm.openai import OpenAIClient
from llmevo.llm.templates import Templates
from llmevo.run.llm_calls import is_repairable, repaired
from llmevo.run.scorer import Scorer
from llmevo.search.optimizers import ASKING, OPTIMIZERS, Optimizer, Setup, recommend
from llmevo.search.optimizers.base import Asking, answered
from llmevo.search.prompts.question import Prompt, Reading
from llmevo.search.simulated_llm import SimulatedClient
from llmevo.search.space import Genes, SearchSpace
from llmevo.search.start_rows import model_stock_weights, usual_rows
from llmevo.search.trial import Candidate, Suggestion, Trial

HERE = Path(__file__).parent
SEARCHES = HERE / "results" / "searches.jsonl"
RANDOM_RECIPES = HERE / "results" / "random-recipes.jsonl"
MARKS = (8, 10, 15, 20, 30, 45, 60, 100, 150, 200)
"""Evaluations after which it is seen what a search has found."""
METRIC = "acc,none"
BASES = ("llm-off", "cma-es")
"""The searches that the others are compared with."""

PRIOR, MASKED, SHORT, ONCE = "+model_stock", "+masked", "+short", "+once"
"""Ends of the names of searches: with Model Stock as a prior, with `mask_names`, in the short form, with an LLM's first
answer only."""
ANY = 2000
"""Random recipes that proposals are compared with."""
FINALS = "finals"
"""The mode of searches that end as a run does."""
MOST_FINALISTS = SearchConfig().finalists + 3
"""With the best parent, the uniform merge and the best coefficient."""

Array = NDArray[np.float64]


class Landscape(Protocol):
    """What the recipes of a search space answer. Points are in unit coordinates, one row each."""

    space: SearchSpace
    tasks: list[str]
    difficulties: dict[str, Array]
    """{task: the difficulties of its questions}."""

    def truth(self, points: Array) -> Array:
        """Return the mean accuracy on endlessly many questions."""
        ...

    def accuracy(self, task: str, points: Array) -> Array:
        """Return the accuracy on endlessly many questions of a task."""
        ...

    def answers(self, task: str, points: Array, difficulties: Array, seed: int) -> Array:
        """Return which point gets which question right (points, questions); another seed is other questions."""
        ...

    @property
    def optimum(self) -> tuple[Array, float]:
        """The best point and its true score."""
        ...

    @property
    def coefficient(self) -> tuple[float, float]:
        """The best weight that all models have in common, and its true score."""
        ...


@cache
def load(name: str) -> Landscape:
    """Return a landscape of `landscapes.py`, or `simulator`."""
    if name == "simulator":
        import simulator

        found: Any = simulator.QuickstartLandscape()  # cached properties are no properties for type checkers
    else:
        import landscapes

        found = landscapes.load(name)
    return found


def scorer_of(name: str) -> Scorer:
    """Return what scores real merges of a landscape's space."""
    if name == "simulator":
        return Scorer(read_config(QUICKSTART), QUICKSTART.parent)
    import landscapes

    return landscapes.scorer_of(name)


@cache
def briefing(name: str) -> dict[str, Any]:
    """Return what a run tells its LLM of a landscape's models and tasks, as arguments of `Setup`; reads the models.

    The answers to questions are simulated: an LLM can learn from the texts what a task is, and not which model answers
    which of its questions.
    """
    scorer = scorer_of(name)
    cards = {short: scorer.sources.card(reference) for reference, short in scorer.space.names.items()}
    return {
        "geometry": scorer.geometry,
        "cards": {short: card for short, card in cards.items() if card},
        "texts": scorer.evaluator.texts(),
        "descriptions": scorer.evaluator.descriptions(),
        "chances": scorer.evaluator.chances(),
    }


# The scores


class Examiner:
    """Scores candidates of one search by questions that its seed draws, as lm-eval does in a run."""

    def __init__(self, landscape: Landscape, questions: int, mode: str, seed: int) -> None:
        self._landscape, self._fresh, self._seed = landscape, mode == "fresh", seed
        self._count = questions
        self._random = np.random.default_rng(seed)
        self._tasks = [Task(name=task, weight=1 / len(landscape.tasks), metric=METRIC) for task in landscape.tasks]
        self._questions = self._draw()
        self._scored = 0

    @property
    def weights(self) -> dict[str, tuple[float, str]]:
        return {task.name: (task.weight, METRIC) for task in self._tasks}

    def texts(self, pool: Mapping[str, Sequence[tuple[str, str]]]) -> dict[str, list[tuple[str, str]]]:
        """Return the texts of the questions, of those of the landscape; none where each candidate gets others."""
        if self._fresh or not self._count:
            return {}
        return {task: [pool[task][number] for number in own] for task, own in self._questions.items()}

    def _draw(self) -> dict[str, NDArray[np.int64]]:
        """Questions of every task by their numbers."""
        known = self._landscape.difficulties
        return {task: self._random.choice(len(known[task]), self._count) for task in self._landscape.tasks}

    def scores(self, points: Array) -> list[Score]:
        """Return the scores of candidates."""
        if not self._count:
            shares = {task: self._landscape.accuracy(task, points) for task in self._landscape.tasks}
            return [self._score({task: float(of[row]) for task, of in shares.items()}) for row in range(len(points))]
        if not self._fresh:
            return [*self._answered(points, self._questions, self._seed)]
        found: list[Score] = []
        for point in points:
            self._scored += 1
            found += self._answered(point[None], self._draw(), 1_000_000 + 1000 * self._seed + self._scored)
        return found

    def further(self, points: Array) -> list[Score]:
        """Return the scores of candidates on as many questions that the search does not ask."""
        return [*self._answered(points, self._draw(), 500_000 + self._seed)]

    def _answered(self, points: Array, questions: Mapping[str, NDArray[np.int64]], seed: int) -> Iterator[Score]:
        known = self._landscape.difficulties
        right = {task: self._landscape.answers(task, points, known[task][own], seed) for task, own in questions.items()}
        for row in range(len(points)):
            answers = {task: [float(value) for value in of[row]] for task, of in right.items()}
            yield self._score({task: float(np.mean(own)) for task, own in answers.items()}, answers)

    def _score(self, shares: Mapping[str, float], answers: Mapping[str, list[float]] | None = None) -> Score:
        results = {task: {METRIC: share} for task, share in shares.items()}
        items = sum(map(len, (answers or {}).values()))
        score = aggregate(self._tasks, results, items, answers or {})
        # Answers to other questions must not be compared one by one.
        return replace(score, item_scores={} if self._fresh else answers or {})


# The LLM


class RecordedReplies:
    """The replies of an earlier search in their order. A later version may word the prompts differently, but it asks in
    the same generations.
    """

    style = "chat"

    def __init__(self, model: str, lines: Iterable[Mapping[str, Any]], once: bool = False) -> None:
        """With `once` only the prompt before any score is answered."""
        self.model, self._lines, self._once = model, deque(lines), once

    def check(self) -> None:
        """Do nothing: the file is read already."""

    def answer(self, request: Any) -> Reply:
        if self._once and request.generation:
            raise ProposerError("only the first prompt is answered")
        line = self._lines.popleft() if self._lines else None
        if line is None or line["generation"] != request.generation:
            raise SystemExit(f"there is no recorded reply to the prompt of generation {request.generation}")
        if line["reply"] is None:
            raise ProposerError("; ".join(line["problems"]))
        return Reply(line["reply"], self.model, *line["tokens"])


class Answerer:
    """Answers the prompts of one search as a run does: an answer without a usable proposal is asked for once more,
    until such a repair has failed.
    """

    def __init__(self, client: Client | None, key: Mapping[str, Any], transcript: Path | None) -> None:
        """`key` names the search in the transcript."""
        self._client, self._transcript = client, transcript
        self._key = {**key, "attempt": time.time_ns()}  # one that was interrupted stays in the file
        self._failed = False
        self._templates = Templates()
        self.calls, self.watch = 0, Stopwatch()
        self.proposals: list[tuple[int, Genes]] = []
        """(generation, genes) of all that the LLM proposed."""

    def suggestions(self, asked: Asking) -> list[Suggestion]:
        """Return what an optimizer proposes, answering the prompts that it yields."""
        return answered(asked, self._answered)

    def _answered(self, prompt: Prompt) -> Reading:
        with self.watch:
            reading = self._reading(prompt)
        self.proposals += [(prompt.generation, proposal.genes) for proposal in reading.proposals]
        return reading

    def _reading(self, prompt: Prompt) -> Reading:
        reply, reading = self._turn(prompt)
        if reply is None or self._failed or not is_repairable(prompt, reading):
            return reading
        _, again = self._turn(repaired(prompt, reply, reading, self._templates))
        self._failed |= not again.proposals
        return again

    def _turn(self, prompt: Prompt) -> tuple[str | None, Reading]:
        if self._client is None:
            return None, Reading(problems=["there is no LLM"], lost=True)
        self.calls += 1
        started, reply, problems, tokens = time.monotonic(), None, list[str](), (0, 0)
        try:
            answer = self._client.answer(prompt)
        except ProposerError as error:
            problems = [str(error)]
            reading = Reading(problems=problems, lost=True)
        else:
            reply, tokens = answer.text, (answer.prompt_tokens, answer.completion_tokens)
            reading = prompt.read(reply)
            problems = [*answer.problems, *reading.problems]
        if self._transcript:
            line = {
                **self._key,
                "generation": prompt.generation,
                "messages": [*prompt.messages],
                "reply": reply,
                "problems": problems,
                "tokens": tokens,
                "seconds": round(time.monotonic() - started, 3),
            }
            with self._transcript.open("a") as out:
                out.write(json.dumps(line) + "\n")
        return reply, reading


# A search


@dataclass(frozen=True)
class Plan:
    """A search before it is run."""

    landscape: str
    search: str
    """The optimizer, with the LLM's name after a colon (simulated) or `@` (of a server)."""
    seed: int
    budget: int
    questions: int
    mode: str

    @property
    def optimizer(self) -> str:
        return self.search.partition("@")[0].partition(":")[0].removesuffix(PRIOR)

    @property
    def policy(self) -> str:
        """The simulated LLM, or an empty text."""
        return "" if "@" in self.search else self.search.partition(":")[2]


class Server(NamedTuple):
    """Where replies come from, and where they are kept."""

    url: str | None = None
    model: str | None = None
    timeout: float = 120.0
    transcript: Path | None = None
    recorded: Path | None = None

    def client(self, plan: Plan, landscape: Landscape) -> Client | None:
        if plan.optimizer not in ASKING:
            return None
        if self.recorded:
            lines = measurements.read(self.recorded)
            wanted = {**asdict(plan), "search": plan.search.removesuffix(ONCE)}
            own = [line for line in lines if all(line[name] == value for name, value in wanted.items())]
            if not own:
                raise SystemExit(f"{self.recorded} has no reply for {plan}")
            last = [line for line in own if line["attempt"] == own[-1]["attempt"]]
            return RecordedReplies(plan.search, last, plan.search.endswith(ONCE))
        if plan.policy:
            return SimulatedClient(Connection(plan.policy), landscape.space.from_unit(landscape.optimum[0]), plan.seed)
        if not self.url:
            raise SystemExit(f"{plan.search}: name a simulated LLM (llm:POLICY), a server (llm@URL) or --recorded FILE")
        key = read_key(None, Path(), "llm", base_url=self.url)
        return OpenAIClient(Connection(self.model, key, self.url, timeout=self.timeout))


NO_SERVER = Server()


class Stopwatch:
    """Adds up the seconds of `with` blocks."""

    seconds = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._started


class Found(NamedTuple):
    """The trials of a search."""

    genes: list[dict[str, float]]
    values: list[float]
    errors: list[float]
    truths: list[float]
    seconds: float
    """Of the optimizer, without the LLM."""
    calls: int
    """Prompts to the LLM."""
    further: list[float]
    """The trials' scores on further questions; empty where none are asked."""
    proposed: list[tuple[int, Genes]]
    """(generation, genes) of the LLM's proposals, of those too that were not scored."""


def searched(landscape: Landscape, plan: Plan, server: Server = NO_SERVER) -> Found:
    """Run one search."""
    space, examiner = landscape.space, Examiner(landscape, plan.questions, plan.mode, plan.seed)
    client = server.client(plan, landscape)
    style = client.style if client else ""
    facts: dict[str, Any] = {}
    if "@" in plan.search:  # simulated LLMs need none
        facts = briefing(plan.landscape)
        facts = {**facts, "texts": examiner.texts(facts["texts"])}
    if plan.search.endswith(MASKED):
        facts = {"geometry": facts["geometry"], "mask_names": True}
    elif plan.search.endswith(SHORT):
        facts |= {"short": True}
    elif plan.search.endswith(PRIOR):
        facts = {"presumed": model_stock_weights(space, briefing(plan.landscape)["geometry"])}
    budget = plan.budget - (MOST_FINALISTS if plan.mode == FINALS else 0)
    setup = Setup(space, plan.seed, budget, examiner.weights, style, Templates(), **facts)
    answerer = Answerer(client, asdict(plan), server.transcript)
    size = SearchConfig().population_of(len(space.genes))
    trials: list[Trial] = []
    truths: list[float] = []
    generation, watch, rows = 0, Stopwatch(), usual_rows(space)
    with watch:
        optimizer = maker(plan.optimizer)(setup)
        rows += answerer.suggestions(optimizer.ask_start(rows))
    proposed = rows[:budget]
    while proposed:
        points = np.array([space.to_unit(suggestion.genes) for suggestion in proposed])
        truths += landscape.truth(points).tolist()
        told = [
            Trial(Candidate(number, generation, one.origin, one.genes, one.note, one.expected), score)
            for number, one, score in zip(count(len(trials)), proposed, examiner.scores(points), strict=False)
        ]
        trials += told
        generation += 1
        left = budget - len(trials)
        with watch:
            optimizer.tell([trial for trial in told if space.contains(trial.candidate.genes)])
            proposed = answerer.suggestions(optimizer.ask(min(size, left))) if left else []
    if close := getattr(optimizer, "close", None):
        close()
    scores = [trial.score for trial in trials if trial.score]
    return Found(
        genes=[dict(trial.candidate.genes) for trial in trials],
        values=[score.total for score in scores],
        errors=[score.stderr for score in scores],
        truths=truths,
        seconds=watch.seconds - answerer.watch.seconds,
        calls=answerer.calls,
        further=_further(examiner, space, trials) if plan.mode == FINALS else [],
        proposed=answerer.proposals,
    )


def _further(examiner: Examiner, space: SearchSpace, trials: Sequence[Trial]) -> list[float]:
    points = np.array([space.to_unit(trial.candidate.genes) for trial in trials])
    return [score.total for score in examiner.further(points)]


def maker(name: str) -> Callable[[Setup], Optimizer]:
    """Return what makes an optimizer of this name."""
    found = OPTIMIZERS.get(name) or rival(name)
    if found is None:
        raise SystemExit(f"there is no optimizer {name!r}; there are {', '.join([*OPTIMIZERS, *RIVALS])}")
    return found


def judged(space: SearchSpace, found: Found, budget: int) -> dict[str, Any]:
    """The true scores of what is handed over, and of the best-scored trial, at each mark: a number of evaluations,
    finalists included.
    """
    rows = [row.origin for row in usual_rows(space)]
    trials = [
        Trial(Candidate(place, 0, "".join(rows[place : place + 1]), genes), Score(value, error, {}, 0))
        for place, (genes, value, error) in enumerate(zip(found.genes, found.values, found.errors, strict=True))
    ]
    marks = sorted({mark for mark in MARKS if mark <= budget} | {budget})
    if found.further:
        marks = [mark for mark in marks if mark >= len(rows) + MOST_FINALISTS]
    counts = [min(mark - (MOST_FINALISTS if found.further else 0), len(trials)) for mark in marks]  # some end before
    handed, best = dict[int, float](), dict[int, float]()
    for number in dict.fromkeys(counts):
        picked = recommend(space, [trial for trial in trials[:number] if space.contains(trial.candidate.genes)])
        assert picked is not None
        if found.further:
            picked = chosen(trials[:number], picked, found.further)
        handed[number] = round(found.truths[picked.candidate.id], 5)
        best[number] = round(found.truths[int(np.argmax(found.values[:number]))], 5)
    return {"marks": marks, "handed": [handed[number] for number in counts], "best": [best[n] for n in counts]}


def chosen(trials: Sequence[Trial], recommended: Trial, further: Sequence[float]) -> Trial:
    """Return the best finalist by all its questions; the finalists are those of `run.finals`."""
    best = sorted(trials, key=lambda trial: -trial.value)
    finalists = best[: SearchConfig().finalists]
    if recommended not in finalists:
        finalists[-1] = recommended
    for origin in ("parent", "uniform", "coefficient"):
        row = next(trial for trial in best if trial.candidate.origin == origin)
        finalists += [row] if row not in finalists else []
    return max(finalists, key=lambda trial: trial.value + further[trial.candidate.id])


# What a line depends on


@cache
def _code(file: Path) -> ast.Module:
    """The code of a file without docstrings and comments, which decide nothing."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [n for n in body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
            node.body = kept or [ast.Pass()]  # type: ignore[attr-defined]
    return tree


OPTIMIZERS_ROOM = "llmevo.search.optimizers"


def _closure(module: str) -> Iterator[tuple[str, str]]:
    """The code of a module of the optimizers' folder and of those there that it imports; not of the interface."""
    pending, seen = [module], {OPTIMIZERS_ROOM, f"{OPTIMIZERS_ROOM}.base"}
    while pending:
        name = pending.pop()
        if name in seen or not name.startswith(OPTIMIZERS_ROOM):
            continue
        seen.add(name)
        tree = _code(Path(str(sys.modules[name].__file__)))
        yield name, ast.dump(tree)
        pending += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]


def _digest(parts: Iterable[tuple[str, str]]) -> str:
    return hashlib.sha256(json.dumps(sorted(set(parts))).encode()).hexdigest()[:12]


@cache
def engine_of(search: str) -> str:
    """The digest of a search's code: of the optimizer's class, of the files of the optimizers' folder that it uses, and
    of the simulated LLM. The prompts are no part of it.
    """
    plan = Plan("", search, 0, 0, 0, "")
    made = maker(plan.optimizer)
    kind: Any = made.func if isinstance(made, partial) else made
    parts: list[tuple[str, str]] = [("arguments", repr(made.args))] if isinstance(made, partial) else []
    if plan.policy:
        parts.append(("simulated LLM", ast.dump(_code(Path(inspect.getfile(SimulatedClient))))))
    for cls in inspect.getmro(kind):
        if cls.__module__ == "rivals":
            tree = next(
                n
                for n in _code(Path(inspect.getfile(cls))).body
                if isinstance(n, ast.ClassDef) and n.name == cls.__name__
            )
            parts.append((cls.__name__, ast.dump(tree)))
        parts += _closure(cls.__module__)
    return _digest(parts)


@cache
def rule_of() -> str:
    """The digest of the rule for what is handed over."""
    return _digest(_closure(recommend.__module__))


@cache
def surface_of(landscape: Landscape) -> str:
    """The digest of a landscape: of its scores at random points."""
    points = np.random.default_rng(0).random((16, len(landscape.space.genes)))
    rows = usual_rows(landscape.space)
    truths = landscape.truth(np.vstack([points, [landscape.space.to_unit(row.genes) for row in rows]]))
    return _digest([("truths", str(np.round(truths, 5).tolist()))])


# The commands


def line_of(plan: Plan, server: Server = NO_SERVER) -> dict[str, Any]:
    """Run a search, or take its trials from the folder of temporary files, and judge it.

    The trials are kept there so that another rule for what is handed over needs no search again.
    """
    landscape = load(plan.landscape)
    name = {**asdict(plan), "engine": engine_of(plan.search), "surface": surface_of(landscape)}
    key = _digest([("plan", json.dumps(name)), ("found", json.dumps(Found._fields))])
    kept = Path(tempfile.gettempdir()) / "llmevo-searches" / f"{key}.json"
    if kept.exists() and not (server.recorded or server.transcript):
        found = Found(**json.loads(kept.read_text()))
    else:
        found = searched(landscape, plan, server)
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps(found._asdict()))
    return {
        **name,
        "rule": rule_of(),
        **judged(landscape.space, found, plan.budget),
        "coefficient": round(float(landscape.coefficient[1]), 5),
        "optimum": round(float(landscape.optimum[1]), 5),
        "evaluations": len(found.values),
        "calls": found.calls,
        **({"proposed": _truths(landscape, found.proposed)} if "@" in plan.search else {}),
        "seconds": round(found.seconds, 2),
    }


def _truths(landscape: Landscape, proposed: Sequence[tuple[int, Genes]]) -> list[tuple[int, float]]:
    """(generation, true score) of proposals."""
    points = np.array([landscape.space.to_unit(genes) for _, genes in proposed])
    truths = landscape.truth(points).tolist() if proposed else []
    return [(generation, round(truth, 5)) for (generation, _), truth in zip(proposed, truths, strict=True)]


def plan_of(line: Mapping[str, Any]) -> Plan:
    return Plan(**{name: line[name] for name in Plan.__dataclass_fields__})


def lines_of(file: Path) -> dict[Plan, dict[str, Any]]:
    """The searches of a file; of a plan that was run again the newest line."""
    return {plan_of(line): line for line in measurements.read(file)}


def run(options: argparse.Namespace) -> None:
    """Run the searches that the file lacks."""
    file: Path = options.out
    names: list[str] = []
    url = None
    for name in options.optimizers.split(","):
        kind, _, address = name.partition("@")
        if "://" in address:
            url, name = address, f"{kind}@{options.model or 'server'}{options.form}"
        maker(Plan("", name, 0, 0, 0, "").optimizer)
        names.append(name)
    server = Server(url, options.model, options.timeout, options.transcript, options.recorded)
    mode = options.mode if options.questions else "exact"
    wanted = [
        Plan(landscape, name, seed, options.budget, options.questions, mode)
        for seed in range(options.first, options.first + options.seeds)
        for landscape in options.landscape.split(",")
        for name in names
    ]
    versions = {plan: (engine_of(plan.search), surface_of(load(plan.landscape)), rule_of()) for plan in wanted}
    lines = lines_of(file)
    missing = [plan for plan, version in versions.items() if plan not in lines or _version(lines[plan]) != version]
    if stale := [plan for plan in missing if plan in lines]:
        print(f"{len(stale)} lines of {file.name} are of earlier code or landscapes, and run again", flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(options.jobs) as pool:
        call = partial(line_of, server=server)
        for line in (map if options.jobs == 1 else pool.map)(call, missing):
            measurements.append(file, line)
            plan, handed = plan_of(line), line["handed"][-1]
            print(f"{plan.landscape} {plan.search} seed {plan.seed}: {handed:.3f}, {line['seconds']} s", flush=True)
    newest = lines_of(file)
    if len(measurements.read(file)) > len(newest):
        kept = file.with_name(f"{file.name}.new")
        kept.write_text("".join(json.dumps(line) + "\n" for line in newest.values()))
        kept.replace(file)


def _version(line: Mapping[str, Any]) -> tuple[str, str, str]:
    return line["engine"], line["surface"], line["rule"]


class Group(NamedTuple):
    """The searches that can be compared."""

    landscape: str
    questions: int
    mode: str
    budget: int

    @property
    def title(self) -> str:
        noise = f"{self.questions} questions a task, {self.mode}" if self.questions else "without noise"
        return f"`{self.landscape}`, {self.budget} evaluations, {noise}"


Lines = dict[str, dict[int, dict[str, Any]]]


def groups(file: Path) -> dict[Group, Lines]:
    """{group: {search: {seed: line}}}, sorted."""
    found: dict[Group, Lines] = {}
    for line in lines_of(file).values():
        group = Group(*(line[name] for name in Group._fields))
        found.setdefault(group, {}).setdefault(line["search"], {})[line["seed"]] = line
    if not found:
        raise SystemExit(f"{file} has no searches")
    return dict(sorted(found.items()))


def table(options: argparse.Namespace) -> None:
    """Print what the searches in a file found."""
    parts: list[str] = []
    for group, lines in groups(options.file).items():
        if options.landscape is None or group.landscape in options.landscape.split(","):
            parts.append("\n".join(_rows(group, lines, options.at, options.curve)))
    print("\n\n".join(parts))


def _rows(group: Group, lines: Lines, at: int | None, curve: str) -> Iterator[str]:
    """A table of one group. Differences are at the mark `at`, at the end without one."""
    some = next(iter(next(iter(lines.values())).values()))
    marks: list[int] = some["marks"]
    place = marks.index(at) if at in marks else len(marks) - 1
    curves = {name: {seed: np.array(line[curve]) for seed, line in own.items()} for name, own in lines.items()}
    means = {name: float(np.mean([of[place] for of in own.values()])) for name, own in curves.items()}
    yield f"{group.title}; best coefficient {some['coefficient']:.3f}, optimum {some['optimum']:.3f}"
    yield ""
    bases = [base for base in BASES if base in curves]
    heads = ["search", *map(str, marks), f"of the way at {marks[place]}", *(f"against {base}" for base in bases)]
    heads += ["seeds", "seconds"]
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for name in sorted(curves, key=lambda name: (-means[name], name)):
        own = curves[name]
        values = np.array([own[seed] for seed in sorted(own)])
        way = [_way(some, value) for value in values[:, place]]
        cells = [tables.with_error(column) for column in values.T]
        cells.append(tables.with_error(way, digits=0) + " %")
        for base in bases:
            common = sorted(own.keys() & curves[base].keys())
            differences = np.array([own[seed][place] - curves[base][seed][place] for seed in common])
            cells.append("" if base == name or not common else tables.with_error(differences, "+"))
        seconds = np.mean([line["seconds"] for line in lines[name].values()])
        yield f"| {' | '.join([name, *cells, str(len(own)), f'{seconds:.1f}'])} |"


def summary(options: argparse.Namespace) -> None:
    """Print how much of the way from the best coefficient to the optimum the searches went, in percent."""
    shown, wanted = options.landscape.split(","), options.optimizers.split(",")
    mode = "fixed" if options.questions else "exact"
    found = {
        group.landscape: lines
        for group, lines in groups(options.file).items()
        if (group.questions, group.budget, group.mode) == (options.questions, options.budget, mode)
    }
    heads = [f"`{landscape}` {mark}" for landscape in shown for mark in options.at]
    print(
        "\n".join(
            tables.rows(["search", *heads], (_shares(name, [found[of] for of in shown], options.at) for name in wanted))
        )
    )


def _shares(search: str, landscapes: Sequence[Lines], marks: Sequence[int]) -> list[str]:
    """The cells of a search."""
    cells = [search]
    for lines in landscapes:
        own = [*lines.get(search, {}).values()]
        for mark in marks:
            ways = [_way(line, line["handed"][line["marks"].index(mark)]) for line in own]
            cells.append(tables.with_error(ways, digits=0))
    return cells


def _way(line: Mapping[str, Any], score: float) -> float:
    """How far a true score is from the best coefficient's to the optimum's, in percent."""
    return 100 * (score - line["coefficient"]) / (line["optimum"] - line["coefficient"])


def proposals(options: argparse.Namespace) -> None:
    """Print what the proposals of LLMs are worth, whether they were scored or not."""
    drawn = [json.loads(line) for line in options.random.read_text().splitlines()]
    print("| landscape | LLM | before any score | afterwards | proposals | searches |")
    print("|---|---|---|---|---|---|")
    for group, lines in groups(options.file).items():
        asked = {  # what answers once are the replies of another search
            search: proposed
            for search, own in sorted(lines.items())
            if not search.endswith(ONCE)
            and (proposed := [line["proposed"] for line in own.values() if line.get("proposed")])
        }
        for search, own in asked.items():
            first = _means([truth for generation, truth in proposed if generation == 0] for proposed in own)
            later = _means([truth for generation, truth in proposed if generation > 0] for proposed in own)
            cells = [tables.with_error(means) for means in (first, later)]
            print(f"| `{group.landscape}` | {search} | {' | '.join(cells)} | {sum(map(len, own))} | {len(own)} |")
        for line in drawn if asked else ():
            if line["landscape"] == group.landscape:
                print(f"| `{group.landscape}` | none: any recipe | {line['mean']:.3f} | | {line['recipes']} | |")


def draw(options: argparse.Namespace) -> None:
    """Write the mean true score of recipes drawn at random, for `proposals`: fitting a landscape takes a minute."""
    with options.out.open("w") as out:
        for name in options.landscape.split(","):
            landscape = load(name)
            truths = landscape.truth(np.random.default_rng(0).random((ANY, len(landscape.space.genes))))
            line = {**measurements.environment(), "landscape": name, "surface": surface_of(landscape)}
            out.write(json.dumps({**line, "recipes": ANY, "mean": round(float(truths.mean()), 4)}) + "\n")


def _means(searches: Iterable[Sequence[float]]) -> list[float]:
    """The mean of each search that has values."""
    return [fmean(values) for values in searches if values]


def picture(options: argparse.Namespace) -> None:
    """Draw the mean curves of the searches in a file."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "llmevo"
    from matplotlib import pyplot as plt

    shown = options.optimizers.split(",") if options.optimizers else None
    found = {
        group: {name: own for name, own in lines.items() if shown is None or name in shown}
        for group, lines in groups(options.file).items()
        if options.landscape in (None, group.landscape) and group.questions == (options.questions or group.questions)
    }
    names = sorted({name for lines in found.values() for name in lines})
    colours = {name: plt.get_cmap("tab20")(place % 20) for place, name in enumerate(names)}
    columns = min(2, len(found))
    height = -(-len(found) // columns)
    figure, axes = plt.subplots(height, columns, figsize=(7 * columns, 4.5 * height), squeeze=False)
    for axis in axes.flat[len(found) :]:
        axis.axis("off")
    for axis, (group, lines) in zip(axes.flat, found.items(), strict=False):
        some = next(iter(next(iter(lines.values())).values()))
        marks: list[int] = some["marks"]
        for name, own in sorted(lines.items()):
            values = np.array([line[options.curve] for line in own.values()])
            mean, error = values.mean(axis=0), values.std(axis=0) / max(len(values) - 1, 1) ** 0.5
            axis.plot(marks, mean, label=name, color=colours[name])
            axis.fill_between(marks, mean - error, mean + error, color=colours[name], alpha=0.15, linewidth=0)
        for name, style in (("coefficient", ":"), ("optimum", "--")):
            label = "best coefficient" if name == "coefficient" else name
            axis.axhline(some[name], color="black", linestyle=style, linewidth=1, label=label)
        axis.set_xscale("log")
        axis.set_xticks(marks, map(str, marks))
        axis.minorticks_off()
        axis.set(title=group.title.replace("`", ""), xlabel="evaluations", ylabel="true score")
        axis.legend(fontsize="x-small", ncols=2)
    figure.tight_layout()
    metadata: Any = {"Date": None} if options.out.suffix == ".svg" else None
    figure.savefig(options.out, dpi=120, metadata=metadata)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(required=True)
    running = commands.add_parser("run", help="run the searches that the file lacks")
    running.add_argument("--landscape", default="quickstart", help="several with commas between them")
    running.add_argument("--optimizers", default="llm-off,cma-es,mergekit-evolve,tpe,random")
    running.add_argument("--seeds", type=int, default=20)
    running.add_argument("--first", type=int, default=0, help="the first seed")
    running.add_argument("--budget", type=int, default=60, help="evaluations, start rows included")
    running.add_argument("--questions", type=int, default=32, help="of each task; 0 for scores without noise")
    running.add_argument(
        "--mode", choices=("fixed", FINALS, "fresh"), default="fixed", help="which questions are asked"
    )
    running.add_argument("--jobs", type=int, default=1, help="searches at a time")
    running.add_argument("--model", help="the server's name of the LLM; lines have it in place of the URL")
    form = running.add_mutually_exclusive_group()
    told: dict[str, Any] = {"dest": "form", "action": "store_const", "default": ""}
    form.add_argument("--masked", const=MASKED, help="show a server's LLM no names and texts", **told)
    form.add_argument("--short", const=SHORT, help="ask a server's LLM in the short form", **told)
    running.add_argument("--timeout", type=float, default=120.0, help="seconds to wait for an answer of the server")
    running.add_argument("--transcript", type=Path, help="a file for the prompts and replies")
    running.add_argument("--recorded", type=Path, help="an earlier transcript, to answer from")
    running.add_argument("--out", type=Path, default=SEARCHES)
    running.set_defaults(command=run)
    showing = commands.add_parser("table", help="what the searches in the file found")
    showing.add_argument("--landscape", help="these only, with commas between them")
    showing.add_argument("--at", type=int, help="the mark at which searches are compared; by default the end")
    short = commands.add_parser("summary", help="one table of several landscapes")
    short.add_argument("--landscape", default="quickstart,overlap,trimming", help="these, with commas between them")
    short.add_argument("--optimizers", default="llm-off,cma-es", help="these, with commas between them")
    short.add_argument("--budget", type=int, default=60, help="only searches of so many evaluations")
    short.add_argument("--questions", type=int, default=64, help="only searches of so many questions a task")
    short.add_argument("--at", type=int, nargs="+", default=[15, 30, 60], help="the marks")
    worth = commands.add_parser("proposals", help="what the proposals of LLMs are worth")
    worth.add_argument("--random", type=Path, default=RANDOM_RECIPES, help="the file that `draw` wrote")
    random = commands.add_parser("draw", help="the mean true score of random recipes")
    random.add_argument("--landscape", default="overlap,quickstart,simulator", help="these, with commas between them")
    random.add_argument("--out", type=Path, default=RANDOM_RECIPES)
    random.set_defaults(command=draw)
    drawing = commands.add_parser("picture", help="the mean curves")
    drawing.add_argument("--out", type=Path, default=SEARCHES.with_suffix(".png"))
    drawing.add_argument("--landscape", help="only this one")
    drawing.add_argument("--optimizers", help="only these, with commas between them")
    drawing.add_argument("--questions", type=int, help="only searches of so many questions a task")
    for command, function in ((showing, table), (short, summary), (drawing, picture), (worth, proposals)):
        command.add_argument("file", nargs="?", type=Path, default=SEARCHES)
        command.set_defaults(command=function)
    for command in (showing, drawing):
        command.add_argument(
            "--curve", choices=("handed", "best"), default="handed", help="handed over, or best-scored"
        )
    return made


def main(words: Sequence[str] | None = None) -> None:
    options = parser().parse_args(words)
    options.command(options)


if __name__ == "__main__":
    main()
