"""Simulated LLMs: what the best and the worst of them would do, for tests and benchmarks."""

import json
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from llmevo.errors import ConfigError, ProposerError, nearest
from llmevo.llm.client import Connection, Reply, Request
from llmevo.search.prompts.question import Prompt, Question
from llmevo.search.prompts.table import GeneTable
from llmevo.search.space import Genes

Point = NDArray[np.float64]


Policy = Callable[[Sequence[Point], np.random.Generator, Point | None], Point]
"""From the elites' points, worst first, to a proposal; the last argument is the optimum, where it is known."""


PARENTS = 4
"""How many of the best the recombiner takes the mean of: as many as LLM-Evo-Merge shows."""


STEP = (0.2, 0.8)
"""How far oracle and adversary go from the best, as a share of its way to the optimum."""


def recombiner(elites: Sequence[Point], random: np.random.Generator, _: Point | None) -> Point:
    """The mean of the best: what EvoLLM found language models to do. Each further proposal takes one parent less."""
    parents = elites[-int(random.integers(2, PARENTS + 1)) :]
    return np.mean(parents, axis=0)


def copier(elites: Sequence[Point], *_: object) -> Point:
    """The best once more."""
    return elites[-1]


def anything(elites: Sequence[Point], random: np.random.Generator, _: Point | None) -> Point:
    """Any point of the search space."""
    return random.random(len(elites[-1]))


def corner(elites: Sequence[Point], random: np.random.Generator, _: Point | None) -> Point:
    """Every gene at one of its bounds: round numbers are what careless models like best."""
    return random.integers(0, 2, len(elites[-1])).astype(np.float64)


def adversary(elites: Sequence[Point], random: np.random.Generator, optimum: Point | None) -> Point:
    """From the best away from the optimum."""
    assert optimum is not None
    return np.clip(elites[-1] - random.uniform(*STEP) * (optimum - elites[-1]), 0.0, 1.0)


def oracle(elites: Sequence[Point], random: np.random.Generator, optimum: Point | None) -> Point:
    """From the best towards the optimum."""
    assert optimum is not None
    return elites[-1] + random.uniform(*STEP) * (optimum - elites[-1])


POLICIES: dict[str, Policy] = {
    "recombiner": recombiner,
    "copier": copier,
    "random": anything,
    "corner": corner,
    "adversary": adversary,
    "oracle": oracle,
}
"""Every simulated LLM by its name."""


NEED_OPTIMUM = ("adversary", "oracle")


class SimulatedClient:
    """Answers as a chat model would, in JSON and whole hundredths, by a fixed policy.

    For tests, benchmarks and trying a config without any LLM. The policies that need to know the optimum can only be
    made by a benchmark, which knows it.
    """

    style = "chat"

    def __init__(self, connection: Connection, optimum: Genes | None = None) -> None:
        """Raises ConfigError for an unknown policy, or one that needs the optimum where there is none."""
        name = connection.model or "recombiner"
        if name not in POLICIES:
            raise ConfigError(f"llm.model: there is no simulated LLM {name!r}{nearest(name, POLICIES)}")
        if name in NEED_OPTIMUM and optimum is None:
            known = ", ".join(policy for policy in POLICIES if policy not in NEED_OPTIMUM)
            raise ConfigError(f"llm.model: {name} needs to know the optimum, as in a benchmark; use one of {known}")
        self.model = name
        self._optimum = optimum

    def check(self) -> None:
        """There is always somebody to ask."""

    def answer(self, request: Request) -> Reply:
        """Raises ProposerError for a request that is no prompt of a search."""
        question = request.question if isinstance(request, Prompt) else None
        if question is None:
            raise ProposerError("the request is no question of a search")
        space, random = question.space, np.random.default_rng(request.seed)
        elites = [space.to_unit(trial.candidate.genes) for trial in question.elites]
        optimum = None if self._optimum is None else space.to_unit(self._optimum)
        policy = POLICIES[self.model]
        start = [space.to_unit(space.uniform())]
        points = [policy(elites or start, random, optimum) for _ in range(question.wanted)]
        proposals = [self._proposal(question, space.from_unit(point), request.seed) for point in points]
        text = json.dumps({"analysis": f"what a simulated {self.model} says", "proposals": proposals})
        return Reply(text, self.model, sum(len(m["content"]) for m in request.messages) // 4, len(text) // 4)

    def _proposal(self, question: Question, genes: Genes, seed: int) -> dict[str, object]:
        table = GeneTable.of(question.space, seed)
        best = max((trial.value for trial in question.scored), default=0.0)
        proposal: dict[str, object] = {
            "reason": self.model,
            "kind": "refine",
            "genome": table.rows(genes),
            "spread": ["same"] * len(table.slices),
            "predicted_score": round(best, 4),
        }
        methods = table.methods(genes)
        if methods:
            per_slice = question.space.genome.method_per_slice
            proposal["merge_method"] = methods if per_slice else methods[0]
        return proposal
