"""What a run works with, made from its config: what it scores with, the optimizer and the proposer, when needed."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from llmevo.config import Config, parse_logged
from llmevo.errors import ConfigError, RunError
from llmevo.evaluation.judges.memory import VerdictMemory
from llmevo.evaluation.score import Score
from llmevo.llm import CLIENTS
from llmevo.llm.client import Client, Connection, read_key
from llmevo.llm.templates import Templates
from llmevo.merging.recipe import Recipe
from llmevo.models.references import ModelReference, folder_of
from llmevo.run.log import events
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import LOG
from llmevo.run.spending import Spending
from llmevo.run.versions import versions
from llmevo.search.encode import read_start
from llmevo.search.optimizers import OPTIMIZERS
from llmevo.search.optimizers.base import Optimizer, Setup
from llmevo.search.prompts import STYLES
from llmevo.search.prompts.question import Question, SliceGeometry
from llmevo.search.simulated_llm import SimulatedClient
from llmevo.search.space import SearchSpace
from llmevo.search.trial import Suggestion

if TYPE_CHECKING:  # who only reads a run has no models, and torch and lm-eval take seconds to import
    from llmevo.evaluation.evaluator import Evaluator
    from llmevo.models.checkpoints import Sources
    from llmevo.run.scorer import Scorer

ASKING = ("llm", "llm-evo-merge")
"""The optimizers that ask an LLM."""


RULES = 2
"""How new runs go about it; see `events.RunStarted`."""


@dataclass
class Experiment:
    """Everything a run needs; nothing is loaded before it is used, so reading a finished run loads nothing."""

    config: Config
    root: Path
    """Where relative references start: the config's folder."""
    given_key: str | None = None
    """The API key of the command line."""
    recorded: events.RunStarted | None = None
    """For a run that began earlier: how it began. What could have changed since is taken from here."""
    shared: "Scorer | None" = None
    """What other runs score with as well; by default one of its own."""
    book: VerdictMemory = field(default_factory=VerdictMemory)
    """What judges and voters have said in this run."""

    @classmethod
    def of_log(
        cls, started: events.RunStarted | None, run: Path, api_key: str | None = None, shared: "Scorer | None" = None
    ) -> Self:
        """The experiment that a logged run was made on. Raises RunError when its log has no beginning."""
        if started is None:
            raise RunError(f"{run}: the log has no beginning; start the run anew")
        root = (run if run.is_dir() else run.parent).absolute() / started.root
        return cls(config_of(started, f"{run}/{LOG}"), root, api_key, started, shared)

    def follow(self, event: events.Event, state: RunState) -> None:
        """An observer for the journal: from a `resumed` event on, the config is as that says."""
        if isinstance(event, events.Resumed) and state.started:
            self.config = config_of(state.started, LOG)

    @cached_property
    def scorer(self) -> "Scorer":
        """What candidates are scored with."""
        from llmevo.run.scorer import Scorer

        return self.shared or Scorer(self.config, self.root)

    @property
    def sources(self) -> "Sources":
        return self.scorer.sources

    @property
    def layers(self) -> int:
        return self.recorded.layers if self.recorded else self.scorer.layers

    @cached_property
    def space(self) -> SearchSpace:
        """Of a logged run, made without its models."""
        return SearchSpace(self.config.genome, self.layers)

    @property
    def geometry(self) -> list[SliceGeometry]:
        """What the weights say of each slice, for an LLM that is told; as it was logged where there is a log."""
        if self.recorded:
            return [SliceGeometry(**facts) for facts in self.recorded.geometry]
        return self.scorer.geometry if self.asks and self.style == "chat" else []

    @property
    def evaluator(self) -> "Evaluator":
        """The search tasks."""
        return self.scorer.evaluator

    @property
    def heldout(self) -> "Evaluator | None":
        """The held-out tasks; None when the config names none."""
        return self.scorer.heldout

    def score(
        self, recipe: Recipe, questions: str = "search", rivals: Sequence[Score] = ()
    ) -> tuple[Score, Mapping[str, float]]:
        """See `Scorer.score`."""
        self.scorer.book = self.book
        return self.scorer.score(recipe, questions, rivals)

    @cached_property
    def templates(self) -> Templates:
        if self.recorded:
            return Templates(recorded=self.recorded.prompts)
        folder = self.config.llm.prompts
        return Templates(self.root / folder if folder else None)

    @cached_property
    def api_key(self) -> str | None:
        """The key of the LLM's server: from the command line, or see `read_key`."""
        llm = self.config.llm
        return self.given_key or read_key(llm.api_key_file, self.root, "llm", llm.api_key_env, llm.base_url)

    @property
    def asks(self) -> bool:
        """Whether the optimizer asks an LLM."""
        return self.config.search.optimizer in ASKING

    @property
    def proposer_name(self) -> str:
        """Which proposer the config means, `auto` resolved."""
        llm = self.config.llm
        if llm.proposer != "auto":
            return llm.proposer
        return "openai" if self.api_key or llm.base_url or llm.model else "local"

    @cached_property
    def proposer(self) -> Client:
        llm, name = self.config.llm, self.proposer_name
        model = llm.model or (str(self.config.genome.references[0].model) if name == "local" else None)
        connection = Connection(
            model=model,
            api_key=self.api_key,
            base_url=llm.base_url,
            temperature=llm.temperature,
            max_tokens=llm.max_tokens,
            timeout=llm.timeout,
            retries=llm.retries,
            root=self.root,
            folder=folder_of(ModelReference.parse(model).model, self.root) if name == "local" and model else None,
            transcript=llm.transcript,
            price=(llm.price.prompt, llm.price.completion),
        )
        return SimulatedClient(connection) if name == "simulated" else CLIENTS[name](connection)

    @property
    def style(self) -> str:
        """How the proposer is asked; a run that is only read again needs no proposer for it."""
        return self.recorded.style if self.recorded else self.proposer.style

    @property
    def prompt_files(self) -> tuple[str, ...]:
        """The templates of what the LLM is asked: the optimizer's own, or those of the style."""
        own: tuple[str, ...] = getattr(OPTIMIZERS[self.config.search.optimizer], "files", ())
        return own or (STYLES[self.style].files if self.asks else ())

    def optimizer(self) -> Optimizer:
        """A fresh one, as the run starts with."""
        search = self.config.search
        setup = Setup(
            self.space,
            search.seed,
            self.evaluations,
            self.config.counted,
            self.style if self.asks else "",
            self.templates,
            geometry=self.geometry,
            mask_names=self.config.llm.mask_names,
            sigma_rule=search.sigma_rule,
            pareto=search.objective == "pareto",
            constraints=self.config.constraints,
            from_uniform=self.rules < 2,
        )
        return OPTIMIZERS[search.optimizer](setup)

    @cached_property
    def own_rows(self) -> list[Suggestion]:
        """The user's own recipes, to be scored first."""
        if self.recorded:
            return [Suggestion(row["genes"], "user", row["name"]) for row in self.recorded.start_from]
        entries = self.config.search.start_from
        tensors = [*self.sources[self.config.genome.references[0]].shapes] if entries else []
        rows = [read_start(self.space, entry, self.root, tensors) for entry in entries]
        return [Suggestion(genes, "user", name) for name, genes in rows]

    @property
    def evaluations(self) -> int:
        """What the optimizer plans with: as many as the budget has room for, as far as that is known at the start."""
        budget = self.config.search.budget
        if budget.items is None:
            return budget.evaluations
        return budget.evaluations_of(self.recorded.items if self.recorded else self.evaluator.items)

    @property
    def rules(self) -> int:
        """See `RunStarted`."""
        return self.recorded.rules if self.recorded else RULES

    @property
    def races_start_rows(self) -> bool:
        """Whether start rows may be stopped early: unless a constraint is counted from what they can do."""
        return self.rules > 0 and not self.config.constraints

    @property
    def coefficients(self) -> list[Suggestion]:
        """Start rows with one weight for all models; see `SearchSpace.coefficients`."""
        if self.rules < 2:
            return []
        return [
            Suggestion(genes, "coefficient", f"coefficient {value:g}")
            for value, genes in self.space.coefficients().items()
        ]

    @property
    def start_rows(self) -> int:
        """How many candidates are scored before the search begins."""
        return len(self.space.merged) + 1 + len(self.coefficients) + len(self.own_rows) + self.config.random_init

    @cached_property
    def texts(self) -> dict[str, dict[str, list[tuple[str, str]]]]:
        """Every set's questions with their right answers; see `Evaluator.texts`."""
        return {name: evaluator.texts() for name, evaluator in self.scorer.evaluators.items()}

    def check(self) -> None:
        """Find every mistake of the user's that can be found before anything is written or computed."""
        rows, budget = self.start_rows, self.config.search.budget
        if budget.evaluations < rows or self.evaluations < rows:
            items = "" if budget.evaluations < rows else f" of {self.evaluator.items} questions each"
            some = ["the parents", "the uniform merge"]
            some += [f"{len(self.coefficients)} with another weight for all models"] if self.coefficients else []
            some += ["your own recipes"] if self.own_rows else []
            some += ["a random one"] if self.config.random_init else []
            raise ConfigError(
                f"search.budget: {budget} is too low; the start rows ({', '.join(some)}) alone are {rows}"
                f" evaluations{items}"
            )
        self.scorer.check_filters()
        self.scorer.check_device()
        if "cost" in budget.bounds and not (self.asks or any(task.judge for task in self.config.tasks)):
            raise ConfigError(
                f"search.budget: the cost ({budget.cost:g}) bounds nothing, for the optimizer"
                f" {self.config.search.optimizer!r} asks no LLM and none judges; give evaluations, items or minutes"
            )
        self.scorer.check_model()
        if self.asks:
            self.templates.texts(self.prompt_files)
            # A mistake in a template shows when it is filled, which a search may do much later.
            search = self.config.search
            question = Question(self.space, (), self.config.counted, 1, 0, 0.0, 0, self.evaluations)
            STYLES[self.style].ask(question, self.templates, search.seed)
            self.proposer.check()
        for evaluator in self.scorer.evaluators.values():
            evaluator.check()
        _ = self.texts  # a question without a right answer shows when that is read
        if self.config.gate:
            _ = self.scorer.gate_prompts

    def started(self) -> events.RunStarted:
        """The first event of a run."""
        search = self.config.search
        return events.RunStarted(
            config=self.config.model_dump(mode="json", exclude_unset=True),
            root=str(self.root),
            prompts={**self.templates.texts(self.prompt_files), **self.evaluator.told()},
            versions=versions(),
            sources=[self._described(reference) for reference in self.config.genome.references],
            seed=search.seed,
            evaluation_seed=search.evaluation_seed,
            genes=[gene.described() for gene in self.space.genes],
            layers=self.layers,
            items=self.evaluator.items,
            heldout_items=self.heldout.items if self.heldout else 0,
            selection_items=self.scorer.selection.items if self.scorer.selection else 0,
            rules=RULES,
            proposer=self.proposer_name if self.asks else "",
            style=self.style if self.asks else "",
            questions={**self.scorer.questions},
            texts=self.texts,
            geometry=[asdict(facts) for facts in self.geometry],
            start_from=[{"name": row.note, "genes": row.genes} for row in self.own_rows],
        )

    def _described(self, reference: Any) -> dict[str, Any]:
        return {
            "reference": str(reference),
            "revision": (reference.lora or reference.model).revision,
            "checksum": self.scorer.checksums[str(reference)],
            "licence": self.sources.licence(reference),
        }


def config_of(started: events.RunStarted, origin: str) -> Config:
    """The config of a logged run, with what `auto` meant then: a key that has come or gone since must not change who
    is asked.
    """
    # Runs older than that key were not asked for it.
    config = parse_logged({"allow_benchmark_tasks": True, **started.config}, origin)
    if started.proposer:
        return config.model_copy(update={"llm": config.llm.model_copy(update={"proposer": started.proposer})})
    return config


def population(experiment: Experiment) -> int:
    """Candidates a generation: the config's, or the rule of CMA-ES (https://arxiv.org/abs/1604.00772, eq. 48)."""
    return experiment.config.search.population_of(len(experiment.space.genes))


def ask_size(experiment: Experiment, state: RunState) -> int:
    """Candidates of the next generation; 0 when the budget is spent, or no further one is sure to fit into it."""
    return Spending(experiment.config.search.budget, state).next_size(population(experiment))
