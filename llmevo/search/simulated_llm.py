"""Simulated LLMs with fixed policies, good and bad ones, for tests and benchmarks."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmevo.errors import ConfigError, ProposerError, nearest
from llmevo.llm.client import Connection, Reply, Request
from llmevo.search.genome import OTHER
from llmevo.search.paths.prompt import Masks, PathPrompt, PathQuestion
from llmevo.search.prompts.names import Names
from llmevo.search.prompts.question import Prompt, Question
from llmevo.search.prompts.table import GeneTable
from llmevo.search.space import Array, Gene, Genes

PARENTS = 4  # the best points that the recombiner averages: as many as LLM-Evo-Merge shows
STEP = (0.2, 0.8)  # of oracle and adversary, a share of the way from the best point to the optimum
KNOWN_STEP = (0.05, 0.3)  # of who knows the signs, a share of a gene's range
AGAIN = 0.05  # the noise of further recipes around a known one
LATE = (0.5, 20.0)  # the noise of `late` before any score, and the scores after which it is a third of that
BELIEFS = 12


@dataclass(frozen=True)
class View:
    """The knowledge of a policy: points of the unit cube."""

    elites: Sequence[Array]
    """The best, worst first."""
    random: np.random.Generator
    """Differs from prompt to prompt."""
    own: np.random.Generator
    """The same in every prompt of a search."""
    target: Array | None = None
    """The optimum, where it is known."""
    share: float = 0.0
    """The number in the policy's name."""
    scores: int = 0
    """The number of scored candidates."""

    @property
    def best(self) -> Array:
        return self.elites[-1]

    @property
    def optimum(self) -> Array:
        assert self.target is not None
        return self.target


Policy = Callable[[View], Array]
"""A function that returns a proposal."""


def recombiner(view: View) -> Array:
    """Return the mean of two to four of the best, as language models do according to EvoLLM."""
    parents = view.elites[-int(view.random.integers(2, PARENTS + 1)) :]
    return np.mean(parents, axis=0)


def copier(view: View) -> Array:
    """Return the best once more."""
    return view.best


def anything(view: View) -> Array:
    """Return any point of the search space."""
    return view.random.random(len(view.best))


def corner(view: View) -> Array:
    """Return a point with every gene at one of its bounds, as careless models do."""
    return view.random.integers(0, 2, len(view.best)).astype(np.float64)


def adversary(view: View) -> Array:
    """Step from the best away from the optimum."""
    return np.clip(view.best - view.random.uniform(*STEP) * (view.optimum - view.best), 0.0, 1.0)


def oracle(view: View) -> Array:
    """Step from the best towards the optimum."""
    return view.best + view.random.uniform(*STEP) * (view.optimum - view.best)


def signs(view: View) -> Array:
    """Step from the best by the known signs, right for a share of the genes and wrong for the others."""
    return np.clip(view.best + view.random.uniform(*KNOWN_STEP) * known_signs(view), 0.0, 1.0)


def known_signs(view: View) -> Array:
    """Return the direction that `signs` uses for every gene."""
    count = len(view.best)
    right = view.own.permutation(count) < round(view.share * count)
    return np.sign(view.optimum - view.best) * np.where(right, 1.0, -1.0)


def recipe(view: View) -> Array:
    """Return about the recipe that it knows: the optimum with normal noise, `share` of the range in every gene."""
    known = known_recipe(view)
    return np.clip(known + AGAIN * view.random.standard_normal(len(known)), 0.0, 1.0)


def known_recipe(view: View) -> Array:
    """Return the recipe that `recipe` uses."""
    return np.clip(view.optimum + view.share * view.own.standard_normal(len(view.best)), 0.0, 1.0)


def late(view: View) -> Array:
    """Return the optimum with less noise the more scores there are."""
    noise = LATE[0] * float(np.exp(-view.scores / LATE[1]))
    return np.clip(view.optimum + noise * view.random.standard_normal(len(view.best)), 0.0, 1.0)


POLICIES: dict[str, Policy] = {
    "recombiner": recombiner,
    "copier": copier,
    "random": anything,
    "corner": corner,
    "adversary": adversary,
    "oracle": oracle,
    "signs": signs,
    "recipe": recipe,
    "late": late,
    "refuser": copier,
    "babbler": anything,
}
"""Every simulated LLM by its name: `refuser` gives no proposal, and `babbler` hostile values.
`signs` and `recipe` have a share after a colon: `signs:0.8`.
"""

NEED_OPTIMUM = ("adversary", "oracle", "signs", "recipe", "late")
SHARES = {"signs": 0.8, "recipe": 0.25}  # without a number in the name

HOSTILE: tuple[Any, ...] = (
    "\x1b]0;owned\x07\x1b[2J",
    "__import__('os').system('id')",
    "{{ cycler.__init__.__globals__ }}",
    "<script>alert(1)</script>[red]",
    "9**9**9**9",
    "(" * 190,
    "\ud800\u202e",
    1e308,
    -(10**40),
    float("nan"),
    None,
    True,
    [[[]]],
    {"model": {"model": "all"}},
    "#-1",
    "P1",
)
"""Values of the babbler's answers."""


class SimulatedClient:
    """A chat model that answers in JSON by a fixed policy, for tests, benchmarks and a trial of a config.

    Some policies need the optimum, which only benchmarks know.
    """

    style = "chat"

    def __init__(self, connection: Connection, optimum: Genes | None = None, seed: int = 0) -> None:
        """`seed`, of the search, decides what a policy of partial knowledge knows. Raise ConfigError for an unknown
        policy, or one that needs the optimum where there is none.
        """
        name, _, share = (connection.model or "recombiner").partition(":")
        if name not in POLICIES:
            raise ConfigError(f"llm.model: there is no simulated LLM {name!r}{nearest(name, POLICIES)}")
        if name in NEED_OPTIMUM and optimum is None:
            known = ", ".join(policy for policy in POLICIES if policy not in NEED_OPTIMUM)
            raise ConfigError(f"llm.model: {name} needs to know the optimum, as in a benchmark; use one of {known}")
        try:
            self._share = float(share) if share else SHARES.get(name, 0.0)
        except ValueError:
            raise ConfigError(f"llm.model: {share!r} of {connection.model!r} is not a number") from None
        self.model, self._policy = connection.model or "recombiner", name
        self._optimum, self._seed = optimum, seed

    def check(self) -> None:
        """Do nothing: it always answers."""

    def answer(self, request: Request) -> Reply:
        """Answer a prompt. Raise ProposerError for any other request."""
        if isinstance(request, PathPrompt) and request.about:
            text = _paths(request.about, np.random.default_rng([self._seed, request.generation]), self._policy)
            return Reply(text, self.model, sum(len(m["content"]) for m in request.messages) // 4, len(text) // 4)
        question = request.question if isinstance(request, Prompt) else None
        if question is None:
            raise ProposerError("the request is no question of a search")
        text = self._text(question, request.seed)
        return Reply(text, self.model, sum(len(m["content"]) for m in request.messages) // 4, len(text) // 4)

    def _text(self, question: Question, seed: int) -> str:
        space, random = question.space, np.random.default_rng(seed)
        if self._policy == "refuser":
            return ""
        if self._policy == "babbler":
            return _babble(random, question)
        elites = [space.to_unit(trial.candidate.genes) for trial in question.elites]
        optimum = None if self._optimum is None else space.to_unit(self._optimum)

        def view() -> View:
            own = np.random.default_rng(self._seed)
            start = [space.to_unit(space.clamp(space.uniform()))]
            return View(elites or start, random, own, optimum, self._share, len(question.scored))

        points = [POLICIES[self._policy](view()) for _ in range(question.wanted)]
        answer = {
            "analysis": f"what a simulated {self.model} says",
            "beliefs": self._beliefs(question, seed, view()),
            "proposals": [_proposal(question, space.from_unit(point), seed, self.model) for point in points],
            "hypotheses": [],
        }
        return json.dumps(answer)

    def _beliefs(self, question: Question, seed: int, view: View) -> list[dict[str, Any]]:
        """What a policy of partial knowledge holds of the genes, those that lie farthest from the best at first."""
        space, shown = question.space, GeneTable.of(question.space, seed).numbers
        numbers = [place for place, gene in enumerate(space.genes) if gene in shown]
        if self._policy == "signs":
            way = known_signs(view)
            groups: dict[tuple[Any, ...], list[Gene]] = {}
            for place in numbers:
                gene = space.genes[place]
                groups.setdefault((gene.model, gene.filter, gene.parameter, way[place]), []).append(gene)
            words = {1.0: "higher", -1.0: "lower", 0.0: "stay"}
            largest = sorted(groups.items(), key=lambda item: -len(item[1]))[:BELIEFS]
            return [_belief(question, seed, genes, direction=words[of[-1]]) for of, genes in largest]
        if self._policy == "recipe":
            known = known_recipe(view)
            farthest = sorted(numbers, key=lambda place: -abs(known[place] - view.best[place]))[:BELIEFS]
            genes = space.from_unit(known)
            own = [space.genes[place] for place in farthest]
            return [_belief(question, seed, [gene], value=genes[gene.name]) for gene in own]
        return []


def _paths(about: PathQuestion, random: np.random.Generator, policy: str) -> str:
    """Paths of one or two random edits; of a babbler what is none, and of a refuser nothing."""
    if policy == "refuser":
        return ""
    masks, paths = Masks(about), about.paths
    singles, found = [*paths.singles(about.others)], list[Any]()
    for _ in range(20 * about.question.wanted):
        edits = [singles[int(random.integers(len(singles)))] for _ in range(1 + int(random.integers(2)))]
        if (path := paths.edited(about.root, edits)) and len(found) < about.question.wanted:
            found.append(str(masks.hidden(path)))
    if policy == "babbler":
        found = [HOSTILE[int(random.integers(len(HOSTILE)))] for _ in range(6)]
    rows = [{"reason": "simulated", "path": path, "predicted_score": 0.5} for path in found]
    return json.dumps({"analysis": "what a simulated LLM says", "paths": rows})


def _belief(
    question: Question, seed: int, genes: Sequence[Gene], direction: str = "stay", value: float | None = None
) -> dict[str, Any]:
    """What is said of some genes of a column."""
    space, gene = question.space, genes[0]
    names = Names(space, question.tasks, question.mask_names)
    table = GeneTable.of(space, seed)
    belief: dict[str, Any] = {"model": names.models[gene.model] if gene.model else "all"}
    if len(space.filters) > 1:
        belief["filter"] = names.filters[gene.filter or OTHER]
    if len({gene.parameter for gene in table.numbers}) > 1:
        belief["parameter"] = names.parameters[gene.parameter]
    if len(table.slices) > 1:
        belief["rows"] = [row for row, label in enumerate(table.slices, start=1) if label in {g.slice for g in genes}]
    return {**belief, "task": None, "direction": direction, "value": value, "confidence": 0.8, "why": "simulated"}


def _proposal(question: Question, genes: Genes, seed: int, reason: str) -> dict[str, Any]:
    space, table = question.space, GeneTable.of(question.space, seed)
    best = max((trial.value for trial in question.scored), default=0.0)
    names = Names(space, question.tasks, question.mask_names)
    methods = [names.methods[method] for method in table.methods(genes)]
    return {
        "reason": reason,
        "purpose": "exploit",
        **({"merge_method": methods if space.genome.method_per_slice else methods[0]} if methods else {}),
        "genome": table.rows(genes),
        "depth": None,
        "move": None,
        "predicted": {"score": round(best, 4), **dict.fromkeys(names.tasks.values())},
    }


def _babble(random: np.random.Generator, question: Question) -> str:
    """An answer of the right keys and of hostile values."""

    def any_of(*more: Any) -> Any:
        values = (*HOSTILE, *more)
        return values[int(random.integers(len(values)))]

    genes = question.space.genes
    keys = ("model", "filter", "parameter", "rows", "task", "direction", "value", "range", "confidence", "why")
    proposals = [
        {"reason": any_of(), "purpose": any_of(), "genome": any_of([any_of() for _ in genes]), "predicted": any_of()},
        {"genome": None, "depth": {str(any_of("all")): any_of("depth**depth")}, "predicted": {str(any_of()): any_of()}},
        {"move": {"from": any_of("best"), "scale": {"model": any_of("all"), "by": any_of()}, "set": any_of()}},
        {"move": {"from": any_of("best"), "towards": any_of("uniform"), "steps": [any_of()] * 9}},
        any_of(),
    ]
    beliefs = [{key: any_of("all", "higher") for key in keys} for _ in range(2 * BELIEFS)]
    claims = [{key: any_of() for key in ("claim", "task", "better", "worse")} for _ in range(BELIEFS)]
    answer = {"analysis": any_of(), "beliefs": beliefs, "proposals": proposals, "hypotheses": any_of(claims)}
    return f"{any_of()} {json.dumps(answer)}"
