"""A merge simulator: the quickstart's models as 300 of their merges were really scored, so that a search takes seconds.

    python benchmarks/simulator.py collect [--recipes 300]     # half an hour; goes on where it stopped
    python benchmarks/simulator.py check                       # how well the simulator tells recipes it has not seen
    python benchmarks/simulator.py race [--seeds 20] [--out FILE]  # what racing saves, and what it costs
    python benchmarks/simulator.py replay [--seeds 100]        # the same with those recipes' own answers

`collect` scores recipes on the quickstart's search questions and keeps which question each got right: half of them
from a scrambled Sobol sequence over the whole box, half normally distributed (0.25) around the uniform merge, where
searches spend their time.

The simulator is an item response model. Question i of a task is answered right when

    ability(recipe) + field_i(recipe) > difficulty_i

where `ability` is a Gaussian process over the genes, one for each task, fitted to the shares of right answers, and
`field_i`, standard normal, is a random field of each question's own over the genes: recipes that are alike answer the
same questions, which is what a paired comparison lives on. Its length scale is the one at which pairs of recipes
disagree as often as they really did. Difficulties are those of the real questions; held-out questions draw theirs from
these anew. A recipe's true score is what it would get on endlessly many questions.

A search is as in a run: the same start rows for every optimizer (the uniform merge, other weights for all models, each
parent), and one rule for what is handed over (`llmevo.search.optimizers.recommend`, and finalists where there are any).
`searches.py` runs searches without racing on it, as the landscape `simulator`.
"""

import argparse
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import asking
import measurements
import numpy as np
from measurements import QUICKSTART
from numpy.typing import NDArray
from scipy.stats import norm, qmc
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern

from llmevo.config import read_config
from llmevo.errors import CandidateError
from llmevo.evaluation.racing import difference, is_beaten
from llmevo.evaluation.score import Score
from llmevo.llm.client import Connection
from llmevo.llm.templates import Templates
from llmevo.run.scorer import Scorer
from llmevo.search.optimizers import OPTIMIZERS
from llmevo.search.optimizers.base import Setup, answered
from llmevo.search.optimizers.recommendation import recommend
from llmevo.search.simulated_llm import SimulatedClient
from llmevo.search.space import SearchSpace
from llmevo.search.start_rows import usual_rows
from llmevo.search.trial import Candidate, Suggestion, Trial

TABLE = Path(__file__).parent / "results" / "quickstart-recipes.jsonl"
SPREAD = 0.25
"""Standard deviation of the recipes around the uniform merge, in shares of a gene's range."""

FINALISTS = 4

Point = NDArray[np.float64]


def points(space: SearchSpace) -> Iterator[Point]:
    """Recipes to score, in unit coordinates: in turns anywhere and around the uniform merge."""
    anywhere = qmc.Sobol(len(space.genes), seed=0)
    random = np.random.default_rng(0)
    middle = space.to_unit(space.uniform())
    while True:
        yield anywhere.random(1)[0]
        yield np.clip(middle + SPREAD * random.standard_normal(len(middle)), 0.0, 1.0)


def collect(options: argparse.Namespace) -> None:
    """Score what the table lacks, a line for each recipe."""
    scorer = Scorer(read_config(QUICKSTART), QUICKSTART.parent)
    done = len(measurements.read(TABLE))
    for number, point in zip(range(options.recipes), points(scorer.space), strict=False):
        if number < done:
            continue
        genes = {name: round(value, 4) for name, value in scorer.space.from_unit(point).items()}
        line: dict[str, Any] = {"genes": [*genes.values()]}
        try:
            score, seconds = scorer.score(scorer.space.decode(genes))
        except CandidateError as error:
            line["failed"] = str(error)
        else:
            rights = {task: "".join(str(int(v)) for v in values) for task, values in score.item_scores.items()}
            line |= {"right": rights}
            print(f"{number + 1}/{options.recipes}: {score.total:.3f} in {sum(seconds.values()):.1f} s", flush=True)
        measurements.append(TABLE, line)


FEATURES = 128
"""Random Fourier features of a question's field (Rahimi and Recht 2007)."""

SCALES = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)


class Simulator:
    """Answers questions as the quickstart's merges do. Points are in unit coordinates, one row each."""

    def __init__(self, recipes: Point, rights: Mapping[str, Point], scale: float | None = None) -> None:
        """`rights` holds for every task which recipe got which question right, recipe by question."""
        self.tasks = [*rights]
        self._abilities: dict[str, GaussianProcessRegressor] = {}
        self.difficulties: dict[str, Point] = {}
        for task, right in rights.items():
            # Probit of the shares, a half added to both sides; probit noise of a share is its error over its density.
            ease = _probit(right.sum(axis=0), len(right))
            shares = _probit(right.sum(axis=1), right.shape[1])
            # Marginally the field widens the difference of ability and difficulty by √(1 + their spread).
            self.difficulties[task] = -(ease - ease.mean()) * np.sqrt(1 + np.var(shares))
            ability = shares * np.sqrt(1 + np.var(self.difficulties[task]))
            share = norm.cdf(shares)
            noise = share * (1 - share) / right.shape[1] / norm.pdf(shares) ** 2
            kernel = ConstantKernel(1.0) * Matern(np.ones(recipes.shape[1]), (0.1, 30), nu=2.5)
            model = GaussianProcessRegressor(
                kernel, alpha=noise, normalize_y=True, n_restarts_optimizer=2, random_state=0
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # length scales at their bound: a gene that does not matter
                self._abilities[task] = model.fit(recipes, ability)
        self.scale = scale or min(SCALES, key=lambda s: abs(self._disagreement(recipes, s) - _disagreement(rights)))

    def ability(self, task: str, points: Point) -> Point:
        return np.asarray(self._abilities[task].predict(points))

    def answers(self, task: str, points: Point, difficulties: Point, seed: int) -> Point:
        """Which point gets which question right; `seed` makes other questions of the same difficulties."""
        ability = self.ability(task, points)
        return (ability[:, None] + self._fields(points, len(difficulties), (task, seed)) > difficulties).astype(float)

    def _fields(self, points: Point, count: int, key: tuple[str, int], scale: float | None = None) -> Point:
        fields = np.empty((len(points), count))
        for question, (waves, phases, weights) in enumerate(_features(*key, count, points.shape[1])):
            angles = points @ (waves / (scale or self.scale)) + phases
            fields[:, question] = np.sqrt(2 / FEATURES) * np.cos(angles) @ weights
        return fields

    def _disagreement(self, recipes: Point, scale: float) -> float:
        found = []
        for task in self.tasks:
            difficulties = self.difficulties[task]
            fields = self._fields(recipes, len(difficulties), (task, 0), scale)
            found.append((self.ability(task, recipes)[:, None] + fields > difficulties).astype(float))
        return _disagreement(dict(zip(self.tasks, found, strict=True)))

    def truth(self, points: Point) -> Point:
        """The mean accuracy on endlessly many questions."""
        return np.mean([self.accuracy(task, points) for task in self.tasks], axis=0)

    def accuracy(self, task: str, points: Point) -> Point:
        """The accuracy on endlessly many questions of a task."""
        gaps = self.ability(task, points)[:, None] - self.difficulties[task][None]
        return norm.cdf(gaps).mean(axis=1)


@lru_cache(maxsize=64)
def _features(task: str, seed: int, count: int, genes: int) -> list[tuple[Point, Point, Point]]:
    """Waves (genes, features) of length scale 1, phases and weights for every question."""
    random = np.random.default_rng([*task.encode(), seed])
    found: list[tuple[Point, Point, Point]] = []
    for _ in range(count):
        waves = random.standard_normal((genes, FEATURES))
        found.append((waves, random.uniform(0, 2 * np.pi, FEATURES), random.standard_normal(FEATURES)))
    return found


class QuickstartLandscape(Simulator):
    """The simulator as one of the landscapes of `searches.py`."""

    def __init__(self) -> None:
        super().__init__(*load())
        self.space = Scorer(read_config(QUICKSTART), QUICKSTART.parent).space

    @cached_property
    def optimum(self) -> tuple[Point, float]:
        """The best point that local searches from good and from random points find, and its true score."""
        random, size = np.random.default_rng(0), len(self.space.genes)
        points = random.random((4000, size))
        best = points[np.argsort(-self.truth(points))[:20]]
        for width in np.geomspace(0.2, 0.002, 30):  # the best 20 of their neighbours, ever nearer
            near = np.repeat(best, 20, axis=0) + width * random.standard_normal((20 * len(best), size))
            pool = np.vstack([best, np.clip(near, 0.0, 1.0)])
            best = pool[np.argsort(-self.truth(pool))[:20]]
        return best[0], float(self.truth(best[:1])[0])

    @cached_property
    def coefficient(self) -> tuple[float, float]:
        """The best weight that all models have in common, and its true score."""
        weights = np.linspace(0.0, 1.0, 1001)
        truths = self.truth(np.repeat(weights[:, None], len(self.space.genes), axis=1))
        gene = self.space.genes[0]
        return gene.low + float(weights[np.argmax(truths)]) * (gene.high - gene.low), float(truths.max())


def _probit(right: Point, of: int) -> Point:
    return np.asarray(norm.ppf((right + 0.5) / (of + 1)))


def _disagreement(rights: Mapping[str, Point]) -> float:
    """How often two recipes answer a question differently, beyond what their shares of right answers make them."""
    excess: list[float] = []
    for right in rights.values():
        share = right.mean(axis=1)
        for one in range(len(right) - 1):
            for other in range(one + 1, min(one + 20, len(right))):
                excess.append(float(np.abs(right[one] - right[other]).mean() - abs(share[one] - share[other])))
    return float(np.mean(excess))


def load(file: Path = TABLE) -> tuple[Point, dict[str, Point]]:
    """The collected recipes in unit coordinates, and what each got right."""
    space = Scorer(read_config(QUICKSTART), QUICKSTART.parent).space
    lines = [line for line in measurements.read(file) if "right" in line]
    names = [gene.name for gene in space.genes]
    recipes = np.array([space.to_unit(dict(zip(names, line["genes"], strict=True))) for line in lines])
    tasks = [*lines[0]["right"]]
    return recipes, {task: np.array([[int(c) for c in line["right"][task]] for line in lines]) for task in tasks}


def check(_: argparse.Namespace) -> None:
    """Ten-fold: the simulator's expectation for recipes it was not fitted to, against their real scores."""
    recipes, rights = load()
    real = np.mean([right.mean(axis=1) for right in rights.values()], axis=0)
    expected = np.empty(len(recipes))
    for fold in range(10):
        held = np.arange(len(recipes)) % 10 == fold
        simulator = Simulator(recipes[~held], {t: r[~held] for t, r in rights.items()}, scale=1.0)
        expected[held] = simulator.truth(recipes[held])
    error = np.sqrt(np.mean((real - expected) ** 2))
    noise = np.sqrt(
        np.mean([np.mean(r.mean(axis=1) * (1 - r.mean(axis=1))) / r.shape[1] for r in rights.values()]) / len(rights)
    )
    print(
        f"{len(recipes)} recipes, real scores {real.min():.3f} to {real.max():.3f}, standard deviation {real.std():.3f}"
    )
    print(f"correlation {np.corrcoef(real, expected)[0, 1]:.3f}, error {error:.3f}, by the noise alone {noise:.3f}")
    print(f"length scale of the questions' fields {Simulator(recipes, rights).scale}")


@dataclass(frozen=True)
class Rules:
    """How candidates of a simulated search are evaluated."""

    looks: int = 1
    """Parts that the questions are asked in; 1 is without racing."""
    error_rate: float = 0.05
    finalists: int = 0
    """How many of the best are asked other questions in the end, to choose by both."""


@dataclass(frozen=True)
class Outcome:
    """What a simulated search came to."""

    truth: float
    """The true score of what it hands over."""
    claimed: float
    """What it says this scores."""
    items: int
    """Questions asked: a finalist that was stopped is asked the rest. The finalists' further ones are not counted."""
    lost: bool
    """Whether a candidate was stopped that full evaluation would have picked."""
    curve: tuple[float, ...]
    """The true score of the best so far, after every evaluation."""
    alike: float
    """The true score of the best-scored start row with one weight for all models."""
    answers: tuple[Mapping[str, Point], ...] = field(repr=False)
    """What every candidate answers, or would if it was asked everything."""
    picked: int
    """Which of them is handed over."""


def raced(answers: Mapping[str, Point], others: Sequence[Score], weights: Mapping[str, float], rules: Rules) -> Score:
    """What a candidate gets that would give these answers, raced against those of the others asked everything."""
    count = sum(map(len, answers.values()))
    rivals = sorted((score for score in others if score.items == count), key=lambda score: -score.total)
    field, seen, looks = [rival.item_scores for rival in rivals], answers, rules.looks if rivals else 1
    for look in range(1, looks):
        part = {task: right[: round(len(right) * look / looks)] for task, right in answers.items()}
        if is_beaten(part, field, weights, look, looks, rules.error_rate):
            seen = part
            break
    items = sum(map(len, seen.values()))
    total = sum(w * float(seen[t].mean()) for t, w in weights.items())
    error = float(np.sqrt(sum(w**2 * (seen[t].var() + 0.01) / len(seen[t]) for t, w in weights.items())))
    if items < count:
        total = rivals[0].total + difference(seen, field[0], weights).mean
    metrics = {task: {"acc,none": float(seen[task].mean())} for task in weights}
    return Score(total, error, metrics, items, {task: [*map(float, right)] for task, right in seen.items()})


def simulated(
    simulator: Simulator, space: SearchSpace, name: str, rules: Rules, budget: int, seed: int, questions: int
) -> Outcome:
    """One search, `name` an optimizer or `llm:` and a simulated LLM."""
    kind, _, model = name.partition(":")
    weights = {task: 1 / len(simulator.tasks) for task in simulator.tasks}
    optimizer = OPTIMIZERS[kind](
        Setup(space, seed, budget, {t: (w, "acc,none") for t, w in weights.items()}, "chat", Templates())
    )
    proposer = SimulatedClient(Connection(model)) if model else None
    drawn = np.random.default_rng(seed)
    difficulties = {task: drawn.choice(real, questions) for task, real in simulator.difficulties.items()}
    trials: list[Trial] = []
    whole: list[float] = []  # what full evaluation would have said
    asked = 0
    truths: list[float] = []
    given: list[Mapping[str, Point]] = []

    def evaluated(point: Point) -> Score:
        nonlocal asked
        answers = {t: simulator.answers(t, point[None], d, seed)[0] for t, d in difficulties.items()}
        given.append(answers)
        whole.append(sum(w * float(answers[t].mean()) for t, w in weights.items()))
        truths.append(float(simulator.truth(point[None])[0]))
        score = raced(answers, [t.score for t in trials if t.score], weights, rules)
        asked += score.items
        return score

    def scored(suggestions: Sequence[Suggestion]) -> None:
        told: list[Trial] = []
        for suggestion in suggestions:
            score = evaluated(space.to_unit(suggestion.genes))
            told.append(Trial(Candidate(len(trials), 0, suggestion.origin, suggestion.genes, suggestion.note), score))
            trials.append(told[-1])
        optimizer.tell([trial for trial in told if space.contains(trial.candidate.genes)])

    scored(usual_rows(space))
    while len(trials) < budget:
        size = min(4 + int(3 * np.log(len(space.genes))), budget - len(trials))
        scored(answered(optimizer.ask(size), asking.by(proposer)))
    full = max(trial.score.items for trial in trials if trial.score)
    ranked = sorted((t for t in trials if t.score and t.score.items == full), key=lambda t: -t.value)
    recommended = recommend(space, [trial for trial in trials if space.contains(trial.candidate.genes)])
    picked = recommended or ranked[0]
    claimed = picked.value
    if rules.finalists:  # as in a run: what is recommended takes the place of the last of the best
        again: dict[int, float] = {}
        finalists = ranked[: rules.finalists]
        if recommended and recommended not in finalists:
            finalists[-1] = recommended
        by_score = sorted(trials, key=lambda t: -t.value)
        for origin in ("parent", "uniform", "coefficient"):
            best_row = next((trial for trial in by_score if trial.candidate.origin == origin), None)
            finalists += [best_row] if best_row and best_row not in finalists else []
        for place, trial in enumerate(finalists):  # one that was stopped is asked the rest
            if trial.score and trial.score.items < full:
                asked += full - trial.score.items
                score = replace(trial.score, total=whole[trial.candidate.id], items=full)
                finalists[place] = Trial(trial.candidate, score)
        for trial in finalists:
            point = space.to_unit(trial.candidate.genes)[None]
            shares = [float(simulator.answers(t, point, d, seed + 1000)[0].mean()) for t, d in difficulties.items()]
            again[trial.candidate.id] = float(np.mean(shares))
        further = sum(map(len, difficulties.values()))
        picked = max(finalists, key=lambda t: _pooled(t, again[t.candidate.id], further))
        claimed = again[picked.candidate.id]
    best = int(np.argmax(whole))
    curve = [truths[int(np.argmax([t.value for t in trials[: n + 1]]))] for n in range(len(trials))]
    stopped = trials[best].score
    lost = stopped is not None and stopped.items < full
    alike = max((t for t in trials if t.candidate.origin in ("uniform", "coefficient")), key=lambda t: t.value)
    return Outcome(
        truth=truths[picked.candidate.id],
        claimed=claimed,
        items=asked,
        lost=lost,
        curve=tuple(curve),
        alike=truths[alike.candidate.id],
        answers=tuple(given),
        picked=picked.candidate.id,
    )


def _pooled(trial: Trial, again: float, further: int) -> float:
    """By all that a finalist was asked."""
    assert trial.score
    return (trial.value * trial.score.items + again * further) / (trial.score.items + further)


RACES = {
    "everything": Rules(finalists=FINALISTS),
    **{
        f"{looks} looks, {rate:.0%}": Rules(looks, rate, FINALISTS)
        for looks, rate in ((5, 0.01), (5, 0.05), (5, 0.1), (5, 0.2), (10, 0.05), (20, 0.05))
    },
}


def race(options: argparse.Namespace) -> None:
    """Racing against full evaluation, the same seeds. The finalists' other questions are not counted, being the same
    for all. The last but one column takes the searches that asked everything and races their candidates in their
    order: how often the one that is handed over would have been stopped.
    """
    simulator, space = Simulator(*load()), Scorer(read_config(QUICKSTART), QUICKSTART.parent).space
    print(
        "| questions of a task | evaluation | held out | against everything | questions | highest score, and stopped"
        " | handed over, and stopped | claimed - held out |"
    )
    print("|---" * 8 + "|")
    lines: list[str] = []
    for questions in options.questions:
        base: list[Outcome] = []
        for name, rules in RACES.items():
            found = [
                simulated(simulator, space, options.optimizer, rules, options.budget, s, questions)
                for s in range(options.seeds)
            ]
            base = base or found
            lost = [rules.looks > 1 and one.picked in _stopped(one.answers, rules) for one in base]
            print(f"| {questions} | {name} | {_compared(found, base, lost)} |", flush=True)
            lines += [
                json.dumps(
                    {
                        "benchmark": "racing-simulator",
                        "questions": questions,
                        "rule": name,
                        "seed": seed,
                        "truth": round(one.truth, 5),
                        "claimed": round(one.claimed, 5),
                        "asked": one.items,
                        "highest stopped": one.lost,
                        "handed over stopped": stopped,
                    }
                )
                for seed, (one, stopped) in enumerate(zip(found, lost, strict=True))
            ]
    if options.out:
        options.out.write_text("".join(f"{line}\n" for line in lines))


def _compared(found: Sequence[Outcome], base: Sequence[Outcome], lost: Sequence[bool]) -> str:
    truths = np.array([one.truth for one in found])
    gaps = truths - np.array([one.truth for one in base])
    share = sum(one.items for one in found) / sum(one.items for one in base)
    error = gaps.std(ddof=1) / np.sqrt(len(gaps))
    first, flattery = np.mean([one.lost for one in found]), np.mean([one.claimed - one.truth for one in found])
    scores = f"{truths.mean():.3f} | {gaps.mean():+.4f} ± {error:.4f}"
    return f"{scores} | {share:.0%} | {first:.0%} | {np.mean(lost):.0%} | {flattery:+.3f}"


def _stopped(answers: Sequence[Mapping[str, Point]], rules: Rules) -> set[int]:
    """Which of a search's candidates are stopped, raced in their order."""
    count = sum(map(len, answers[0].values()))
    scores: list[Score] = []
    for own in answers:
        scores.append(raced(own, scores, {task: 1 / len(own) for task in own}, rules))
    return {number for number, score in enumerate(scores) if score.items < count}


def replay(options: argparse.Namespace) -> None:
    """Racing on the collected recipes' own answers: recipes and questions come in another order for every seed."""
    rights = load()[1]
    weights = {task: 1 / len(rights) for task in rights}
    truth = np.mean([right.mean(axis=1) for right in rights.values()], axis=0)
    everything = sum(right.shape[1] for right in rights.values())
    print("| evaluation | questions | the winner stopped | handed over, against the winner |")
    print("|---|---|---|---|")
    for name, rules in RACES.items():
        asked, lost, gaps = 0, list[bool](), list[float]()
        for seed in range(options.seeds):
            random = np.random.default_rng(seed)
            order = random.permutation(len(truth))[: options.budget]
            shuffled = {task: right[:, random.permutation(right.shape[1])] for task, right in rights.items()}
            scores: list[Score] = []
            for recipe in order:
                scores.append(raced({task: right[recipe] for task, right in shuffled.items()}, scores, weights, rules))
            whole = [
                (score.total, truth[recipe])
                for recipe, score in zip(order, scores, strict=True)
                if score.items == everything
            ]
            asked += sum(score.items for score in scores)
            lost.append(scores[int(np.argmax(truth[order]))].items < everything)
            gaps.append(max(whole)[1] - truth[order].max())
        share = asked / (everything * options.budget * options.seeds)
        error = np.std(gaps, ddof=1) / np.sqrt(len(gaps))
        print(f"| {name} | {share:.0%} | {np.mean(lost):.1%} | {np.mean(gaps):+.4f} ± {error:.4f} |", flush=True)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(required=True)
    collecting = commands.add_parser("collect", help="score real recipes; goes on where it stopped")
    collecting.add_argument("--recipes", type=int, default=300)
    collecting.set_defaults(command=collect)
    checking = commands.add_parser("check", help="how well it tells recipes it has not seen")
    checking.set_defaults(command=check)
    racing = commands.add_parser("race", help="what racing saves, and what it costs")
    racing.add_argument("--seeds", type=int, default=20)
    racing.add_argument("--budget", type=int, default=60)
    racing.add_argument("--questions", type=int, nargs="+", default=[64], help="of each of the five tasks")
    racing.add_argument("--out", type=Path, help="a line for every search")
    racing.add_argument("--optimizer", default="llm-off")
    racing.set_defaults(command=race)
    replaying = commands.add_parser("replay", help="what racing saves on the collected recipes' own answers")
    replaying.add_argument("--seeds", type=int, default=100)
    replaying.add_argument("--budget", type=int, default=60)
    replaying.set_defaults(command=replay)
    return made


def main() -> None:
    options = parser().parse_args()
    options.command(options)


if __name__ == "__main__":
    main()
