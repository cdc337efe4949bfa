"""The search without a run: ask an optimizer for candidates, score them yourself, tell it the scores."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmevo.errors import ConfigError, ProposerError, RunError, nearest
from llmevo.evaluation.score import Score
from llmevo.llm.client import Client
from llmevo.llm.templates import Templates
from llmevo.merging.recipe import Recipe
from llmevo.models.architecture import routers_of
from llmevo.models.sources import Sources
from llmevo.search.genome import Genome
from llmevo.search.optimizers import ASKING, recommend
from llmevo.search.optimizers.base import Setup, answered
from llmevo.search.paths.registry import PATHS, every
from llmevo.search.paths.scanned import read_scan
from llmevo.search.prompts.question import Prompt, Reading
from llmevo.search.space import SearchSpace
from llmevo.search.start_rows import usual_rows
from llmevo.search.trial import Candidate, Suggestion, Trial

METRIC = "score,none"


class Search:
    """Search for a merge recipe with an evaluator of your own; no engine, no tasks and no log take part.

    The first candidates are start rows: the uniform merge, the same with other weights for all models, and every model
    alone. Like a run, a search works in generations: `ask` returns candidates of the next generation once all of the
    last one are told.

    >>> import llmevo
    >>> genome = {"base_model": "base", "models": ["one", "two"], "merge_method": "task_arithmetic"}
    >>> search = llmevo.Search(genome, layers=2, optimizer="cma-es", seed=0, budget=30)
    >>> while candidates := search.ask(6):
    ...     for candidate in candidates:
    ...         one, two = candidate.genes.values()
    ...         search.tell(candidate, -((one - 0.3) ** 2) - (two - 0.8) ** 2)
    >>> best = search.best
    >>> best.value > -0.01
    True
    >>> search.recipe(best.candidate).merge_method
    'task_arithmetic'
    """

    def __init__(
        self,
        genome: Genome | Mapping[str, Any],
        *,
        layers: int | None = None,
        optimizer: str = "llm-off",
        seed: int = 0,
        budget: int = 100,
        client: Client | None = None,
        root: Path | str = ".",
    ) -> None:
        """`genome` is the `genome:` of a config; `layers` the models' depth, by default read from the first model;
        `budget` the number of candidates, start rows included; `client` the LLM of the optimizers that ask one;
        `root` the folder that relative references start from.

        Raises ConfigError for an unknown optimizer, a client that is missing, `layers` below 1 and a `path.scan` that
        is none, and pydantic's
        ValidationError for a genome that is none.
        """
        known = every()
        if optimizer not in known:
            raise ConfigError(f"optimizer {optimizer!r} is unknown{nearest(optimizer, known)}")
        if optimizer in ASKING and optimizer not in PATHS and client is None:
            raise ConfigError(f"optimizer {optimizer!r} asks an LLM; give the search a `client`, or take 'llm-off'")
        genome = Genome.model_validate(genome)
        routers: list[str] = []
        if layers is None:
            first = genome.references[0]
            sources = Sources.open([first], Path(root))
            layers, routers = sources.depth(first), routers_of(sources[first].shapes, sources.config(first))
        if layers < 1:
            raise ConfigError(f"layers: {layers} is no number of layers; give that of the models, or leave it out")
        self.space = SearchSpace(genome, layers, routers)
        self.budget = budget
        self.trials: list[Trial] = []
        """All trials told so far, failures included."""
        self._client = client
        tasks = {"score": (1.0, METRIC)}
        style = client.style if client else "" if optimizer in PATHS else "chat"
        scan = read_scan(genome.path.scan, Path(root)) if genome.path and genome.path.scan else {}
        self._optimizer = known[optimizer](Setup(self.space, seed, budget, tasks, style, Templates(), scan=scan))
        self._asked = self._generation = 0
        self._open: dict[int, Candidate] = {}
        self._told: list[Trial] = []
        rows = usual_rows(self.space)
        self._queue = [*rows, *answered(self._optimizer.ask_start(rows), self._answer)]

    def ask(self, size: int) -> list[Candidate]:
        """Return the next candidates, at most `size`; none when the budget is spent.

        Raises RunError while candidates of the last generation have no score.
        """
        size = min(size, self.budget - self._asked)
        if size > 0 and not self._queue:
            if self._open:
                raise RunError(f"candidates {[*self._open]} have no score yet; tell the search of them first")
            self._generation += 1
            self._queue = self._propose(size)
        suggestions, self._queue = self._queue[: max(size, 0)], self._queue[max(size, 0) :]
        candidates = [
            Candidate(self._asked + place, self._generation, of.origin, of.genes, of.note, of.expected, of.path)
            for place, of in enumerate(suggestions)
        ]
        self._asked += len(candidates)
        self._open |= {candidate.id: candidate for candidate in candidates}
        return candidates

    def tell(self, candidate: Candidate, score: float | None, stderr: float = 0.0) -> None:
        """Give a candidate its score, higher is better, with its standard error; None or NaN for one that failed.

        Raises RunError for a candidate that is not waiting for a score.
        """
        if candidate.id not in self._open:
            raise RunError(f"candidate {candidate.id} is not waiting for a score; it was told before, or never asked")
        if score is None or not math.isfinite(score):
            trial = Trial(self._open.pop(candidate.id), None, "it has no score")
        else:
            trial = Trial(self._open.pop(candidate.id), Score(score, stderr, {"score": {METRIC: score}}, 1))
        self.trials.append(trial)
        self._told.append(trial)
        if not self._open and not self._queue:
            self._optimizer.beside = [trial for trial in self.trials if not trial.candidate.lies_in(self.space)]
            self._optimizer.tell(self._inside(sorted(self._told, key=lambda told: told.candidate.id)))
            self._told = []

    def recipe(self, candidate: Candidate) -> Recipe:
        """Return the recipe of a candidate, for `merge` or mergekit."""
        return self.space.decode(candidate.genes, candidate.path)

    @property
    def best(self) -> Trial | None:
        """The trial with the highest score, or with the highest expected score where scores have standard errors."""
        found = max((trial for trial in self.trials if trial.score), key=lambda trial: trial.value, default=None)
        if found and found.candidate.path:
            return found
        return recommend(self.space, [t for t in self.trials if t.candidate.lies_in(self.space)]) or found

    def _inside(self, trials: Sequence[Trial]) -> list[Trial]:
        """The trials in the space; a model alone may lie outside the bounds."""
        learns = self._optimizer.learns_paths
        return [trial for trial in trials if learns or trial.candidate.lies_in(self.space)]

    def _propose(self, size: int) -> list[Suggestion]:
        return answered(self._optimizer.ask(size), self._answer)

    def _answer(self, prompt: Prompt) -> Reading:
        if self._client is None:
            return Reading(problems=["there is no LLM"], lost=True)
        try:
            return prompt.read(self._client.answer(prompt).text)
        except ProposerError as error:
            return Reading(problems=[str(error)], lost=True)
