"""Simulated LLMs with fixed policies, good and bad ones, for tests and benchmarks."""

import json
from collections.abc import Callable, Sequence

import numpy as np

from llmevo.errors import ConfigError, ProposerError, nearest
from llmevo.llm.client import Connection, Reply, Request
from llmevo.search.prompts.question import Prompt, Question
from llmevo.search.prompts.table import GeneTable
from llmevo.search.space import Array, Genes

Policy = Callable[[Sequence[Array], np.random.Generator, Array | None], Array]
"""A function of the elites' points, worst first, and of the optimum, where it is known, that returns a proposal."""

PARENTS = 4  # the best points that the recombiner averages: as many as LLM-Evo-Merge shows
STEP = (0.2, 0.8)  # of oracle and adversary, a share of the way from the best point to the optimum


def recombiner(elites: Sequence[Array], random: np.random.Generator, _: Array | None) -> Array:
    """Return the mean of two to four of the best, as language models do according to EvoLLM."""
    parents = elites[-int(random.integers(2, PARENTS + 1)) :]
    return np.mean(parents, axis=0)


def copier(elites: Sequence[Array], *_: object) -> Array:
    """Return the best once more."""
    return elites[-1]


def anything(elites: Sequence[Array], random: np.random.Generator, _: Array | None) -> Array:
    """Return any point of the search space."""
    return random.random(len(elites[-1]))


def corner(elites: Sequence[Array], random: np.random.Generator, _: Array | None) -> Array:
    """Return a point with every gene at one of its bounds, as careless models do."""
    return random.integers(0, 2, len(elites[-1])).astype(np.float64)


def adversary(elites: Sequence[Array], random: np.random.Generator, optimum: Array | None) -> Array:
    """Step from the best away from the optimum."""
    assert optimum is not None
    return np.clip(elites[-1] - random.uniform(*STEP) * (optimum - elites[-1]), 0.0, 1.0)


def oracle(elites: Sequence[Array], random: np.random.Generator, optimum: Array | None) -> Array:
    """Step from the best towards the optimum."""
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
    """A chat model that answers in JSON by a fixed policy, for tests, benchmarks and a trial of a config.

    Two policies need the optimum, which only benchmarks know.
    """

    style = "chat"

    def __init__(self, connection: Connection, optimum: Genes | None = None) -> None:
        """Raise ConfigError for an unknown policy, or one that needs the optimum where there is none."""
        name = connection.model or "recombiner"
        if name not in POLICIES:
            raise ConfigError(f"llm.model: there is no simulated LLM {name!r}{nearest(name, POLICIES)}")
        if name in NEED_OPTIMUM and optimum is None:
            known = ", ".join(policy for policy in POLICIES if policy not in NEED_OPTIMUM)
            raise ConfigError(f"llm.model: {name} needs to know the optimum, as in a benchmark; use one of {known}")
        self.model = name
        self._optimum = optimum

    def check(self) -> None:
        """Do nothing: it always answers."""

    def answer(self, request: Request) -> Reply:
        """Answer a prompt. Raise ProposerError for any other request."""
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
