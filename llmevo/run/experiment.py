"""Everything a run needs, made from its config: models, tasks and engine to score with, optimizer and LLM client."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from llmevo.config import Config, parse_logged
from llmevo.errors import ConfigError, RunError, SourceError, plural
from llmevo.evaluation.judges.verdicts import VerdictMemory
from llmevo.llm import CLIENTS
from llmevo.llm.client import Client, Connection, read_key
from llmevo.llm.templates import Templates
from llmevo.models.gains import Branches
from llmevo.models.references import ModelReference, folder_of
from llmevo.run.log import events
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import LOG
from llmevo.run.spending import Spending
from llmevo.run.versions import versions
from llmevo.search.encode import read_start
from llmevo.search.objectives.objective import ROUNDING
from llmevo.search.optimizers import ASKING, EARLIER, OPTIMIZERS
from llmevo.search.optimizers.base import Optimizer, Setup
from llmevo.search.paths import prompt as paths_prompt
from llmevo.search.paths.both import BothSpaces
from llmevo.search.paths.prompt import FILES as PATH_FILES
from llmevo.search.paths.prompt import PathQuestion
from llmevo.search.paths.registry import MAKES, PATHS, every
from llmevo.search.paths.scanned import Scanned, read_scan
from llmevo.search.prompts import STYLES
from llmevo.search.prompts.question import Question, SliceGeometry
from llmevo.search.simulated_llm import SimulatedClient
from llmevo.search.space import SearchSpace
from llmevo.search.start_rows import (
    MODEL_STOCK,
    by_model_stock,
    by_router_use,
    mixture_in,
    model_stock_weights,
    parent_rows,
    usual_rows,
)
from llmevo.search.trial import Suggestion, Trial
from llmevo.workers.protocol import Result, Workers

if TYPE_CHECKING:  # torch and lm-eval take seconds to import, and reading a run needs neither
    from llmevo.evaluation.evaluator import Evaluator
    from llmevo.models.sources import Sources
    from llmevo.run.scorer import Scorer

RULES = 5
"""The `rules` of new runs: see `events.RunStarted`."""

STEADY = [name for name, kind in OPTIMIZERS.items() if getattr(kind, "is_steady", False)]
"""The optimizers that need no generations."""

OPTIONAL = ("llm", "paths")
"""The optimizers that ask an LLM where there is one."""

SEVERAL = 3
"""Workers from which on waiting for the last of a generation costs more than it gives: see benchmarks/workers.py."""


@dataclass
class Experiment:
    """The parts of a run, each made when it is first used: reading a finished run loads no model."""

    config: Config
    root: Path
    """The folder that relative references start from: the config's."""
    given_key: str | None = None
    """The API key of the command line."""
    recorded: events.RunStarted | None = None
    """The beginning of a run that is resumed or replayed; it decides what could have changed since."""
    shared: "Scorer | None" = None
    """A scorer that several runs share; by default the run has one of its own."""
    name: str = ""
    """The name of a run of a comparison. These are all asked for one candidate at a time, and go on at the same time,
    so that their results do not depend on the number of workers."""
    verdicts: VerdictMemory = field(default_factory=VerdictMemory)
    """The verdicts of judges and voters in this run, shared by its journal and its judged tasks."""
    exhausted: bool = field(default=False, init=False)
    """Whether the optimizer has no candidate left, which ends the search."""

    def __post_init__(self) -> None:
        if self.shared:
            self.shared.verdicts_of[self.name] = self.verdicts

    @classmethod
    def of_log(
        cls,
        started: events.RunStarted | None,
        run: Path,
        api_key: str | None = None,
        shared: "Scorer | None" = None,
        name: str = "",
    ) -> Self:
        """Return the experiment of a logged run. Raises RunError when its log has no beginning."""
        if started is None:
            raise RunError(f"{run}: the log has no beginning; start the run anew")
        root = (run if run.is_dir() else run.parent).absolute() / started.root
        return cls(config_of(started, f"{run}/{LOG}"), root, api_key, started, shared, name)

    def follow(self, event: events.Event, state: RunState) -> None:
        """Observe a journal: a `resumed` event changes the config."""
        if isinstance(event, events.Resumed) and state.started:
            self.config = config_of(state.started, LOG)

    # Scoring

    @cached_property
    def scorer(self) -> "Scorer":
        from llmevo.run.scorer import Scorer

        return self.shared or Scorer(self.config, self.root, verdicts=self.verdicts)

    @property
    def sources(self) -> "Sources":
        return self.scorer.sources

    @property
    def evaluator(self) -> "Evaluator":
        """The search tasks."""
        return self.scorer.evaluator

    @property
    def heldout(self) -> "Evaluator | None":
        """The held-out tasks; None when the config names none."""
        return self.scorer.heldout

    def event_of(self, result: Result, rivals: Sequence[Trial] = ()) -> events.Evaluated | events.Failed:
        """Return the event of a candidate's result, raced against the rivals, the best first."""
        assert isinstance(result.id, int)
        stopped = bool(rivals) and result.score is not None and result.score.items < self.evaluator.items
        rival = rivals[0].candidate.id if stopped else None
        return events.of_result(result, result.id, rival, self.shows_names, self.config.engine.search_format)

    @cached_property
    def worker_count(self) -> int:
        """How many candidates are scored at the same time, from the log where there is one."""
        if self.name:
            return 1
        return self.recorded.workers if self.recorded else self.scorer.count_workers()

    @cached_property
    def workers(self) -> Workers:
        """The workers, as this run sees them."""
        return self.scorer.share(self.name) if self.name else self.scorer.workers

    def leave_workers(self) -> None:
        """Leave the workers, where several runs share them."""
        if self.name and (workers := vars(self).pop("workers", None)):
            workers.close()

    @property
    def order(self) -> Literal["", "strict", "steady"]:
        """See `events.RunStarted`, from the log where there is one."""
        if self.recorded:
            return self.recorded.order
        if self.name or self.scorer.is_local:
            return ""
        if self.config.search.order != "auto":
            return self.config.search.order
        # An LLM that is awaited holds up each candidate, but a generation only once.
        search = self.config.search
        is_steady = search.optimizer in STEADY and search.spaces != "both" and not self.asks
        return "steady" if is_steady and self.worker_count >= SEVERAL else "strict"

    # The search space and its start rows

    @property
    def layers(self) -> int:
        return self.recorded.layers if self.recorded else self.scorer.layers

    @property
    def routers(self) -> Sequence[str]:
        return self.recorded.routers if self.recorded else self.scorer.routers

    @cached_property
    def space(self) -> SearchSpace:
        vocabulary = self.recorded.vocabulary if self.recorded else self.scorer.vocabulary
        space = SearchSpace(self.config.genome, self.layers, self.routers, bool(vocabulary))
        if (bound := self._deepest(space)) is not None:
            space.paths.narrow(bound)
        return space

    def _deepest(self, space: SearchSpace) -> int | None:
        """The most layers that the constraints on sizes allow a path; None without such, and where the models
        themselves have more, as then candidates that violate them lead to those that satisfy them.
        """
        found: list[float] = []
        (layers, others), (active, head) = self._layer_parameters, self._active_parameters
        for constraint in self.config.objective.constraints:
            if constraint.at_least or constraint.row or not self.config.objective.is_size(constraint.task):
                continue
            if constraint.task == "layers":
                found.append(constraint.offset)
            elif constraint.task == "parameters" and len({*layers}) == 1:
                found.append((constraint.offset - others) / layers[0])
            elif constraint.task == "time" and len({*active}) == 1:
                found.append((constraint.offset * (head + sum(active)) - head) / active[0] + ROUNDING)
        deepest = int(min(found)) if found else None
        return deepest if deepest is not None and deepest >= space.layers else None

    @property
    def geometry(self) -> list[SliceGeometry]:
        """Norms of and cosines between task vectors for the prompt and a prior, from the log where there is one."""
        if self.recorded:
            return [SliceGeometry(**facts) for facts in self.recorded.geometry]
        return self.scorer.geometry if (self.asks and self.style == "chat") or self.config.search.prior else []

    @property
    def presumed(self) -> dict[str, float]:
        """Where the best weights are presumed (`search.prior`)."""
        if self.config.search.prior is None:
            return {}
        return model_stock_weights(self.space, self.geometry)

    @property
    def shows_names(self) -> bool:
        """Whether the prompt holds names and texts: it is for a chat model, and nothing is masked."""
        return self.asks and self.style == "chat" and not self.config.llm.mask_names

    @property
    def cards(self) -> dict[str, str]:
        """Excerpts of the models' cards for the LLM's prompt, from the log where there is one."""
        if self.recorded:
            return self.recorded.cards
        models = self.space.names.items() if self.shows_names else ()
        found = {name: self.sources.card(reference) for reference, name in models}
        return {name: card for name, card in found.items() if card}

    @property
    def descriptions(self) -> dict[str, str]:
        """The search tasks' descriptions for the LLM's prompt, from the log where there is one."""
        if self.recorded:
            return self.recorded.descriptions
        return self.evaluator.descriptions() if self.shows_names else {}

    @property
    def chances(self) -> dict[str, float]:
        """The search tasks' metrics of a model that guesses, for the LLM's prompt, from the log where there is one."""
        if self.recorded:
            return self.recorded.chances
        return self.evaluator.chances() if self.shows_names else {}

    @cached_property
    def own_rows(self) -> list[Suggestion]:
        """The user's own recipes (`search.start_from`), after the average of a mixture's experts by their use."""
        if self.recorded:
            return [
                Suggestion(row["genes"], "user", row["name"], path=row.get("path", ""))
                for row in self.recorded.start_from
            ]
        entries = self.config.search.start_from
        tensors = [*self.sources[self.config.genome.references[0]].shapes] if entries else []
        rows: list[Suggestion] = []
        if mixture := mixture_in(self.config.genome):
            rows += by_router_use(self.space, mixture, self.scorer.router_use(mixture))
        for entry in entries:
            if entry == Path(MODEL_STOCK):
                rows += by_model_stock(self.space, self.scorer.geometry)
            else:
                rows.append(read_start(self.space, entry, self.root, tensors, self._branches))
        return rows

    @property
    def start_rows(self) -> list[Suggestion]:
        """The candidates scored before the search begins: uniform merge, coefficients, parents, the user's recipes."""
        if self.rules >= 2:
            rows = usual_rows(self.space)
        else:  # without coefficients; in the oldest logs the uniform merge, which parents are raced against, comes last
            rows = parent_rows(self.space)
            rows.insert(0 if self.rules else len(rows), Suggestion(self.space.uniform(), "uniform"))
        rows += self.own_rows
        if self.config.random_init:
            point = np.random.default_rng(self.config.search.seed).random(len(self.space.genes))
            rows.append(Suggestion(self.space.from_unit(point), "random", "random_init"))
        return rows

    @property
    def rules(self) -> int:
        """See `events.RunStarted`."""
        return self.recorded.rules if self.recorded else RULES

    @property
    def races_start_rows(self) -> bool:
        """Whether start rows are raced: not where a constraint is relative to their scores."""
        return self.rules > 0 and not self.config.constraints

    # The optimizer and its LLM

    def optimizer(self) -> Optimizer:
        """Make the optimizer as it is when the run starts."""
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
            cards=self.cards,
            texts=self._shown_texts,
            descriptions=self.descriptions,
            chances=self.chances,
            short=self.asks_short,
            from_uniform=self.rules < 2,
            before_rules_4=self.rules < 4,
            before_rules_5=self.rules < 5,
            budget_is_known=not {"minutes", "cost"} & search.budget.bounds.keys(),
            parallel=self.worker_count,
            population=search.population if self.rules > 4 else None,
            scan=self.scan,
            presumed=self.presumed,
        )
        earlier = EARLIER if self.rules < 3 else {}
        name = search.optimizer if self.asks or search.optimizer != "llm" else "llm-off"
        made = {**every(), **earlier}[name]
        return BothSpaces(setup, made, search.shares) if search.spaces == "both" else made(setup)

    @property
    def evaluations(self) -> int:
        """The budget in evaluations, as far as it is known at the start."""
        budget = self.config.search.budget
        if budget.items is None:
            return budget.evaluations
        return budget.evaluations_of(self.recorded.items if self.recorded else self.evaluator.items)

    @property
    def forecasts(self) -> bool:
        """Whether only what is spent tells how many evaluations fit: minutes or cost bound the search, or questions, of
        which racing leaves some out.
        """
        raced = {"items"} if self.config.search.racing and self.rules > 4 else set[str]()
        return bool({"minutes", "cost", *raced} & self.config.search.budget.bounds.keys())

    @property
    def asks(self) -> bool:
        """Whether the optimizer asks an LLM: `llm` and `paths` do not where `llm.proposer` is auto and nothing says
        which LLM.
        """
        if self.config.search.optimizer not in ASKING:
            return False
        if self.recorded:
            return bool(self.recorded.proposer)
        llm = self.config.llm
        return self.config.search.optimizer not in OPTIONAL or llm.proposer != "auto" or self.proposer_name == "openai"

    @property
    def lacks_llm(self) -> bool:
        """Whether the optimizer of a space of weights asks an LLM, and there is none."""
        optimizer = self.config.search.optimizer
        return not self.asks and optimizer in ASKING and optimizer not in PATHS

    @cached_property
    def templates(self) -> Templates:
        if self.recorded:
            return Templates(recorded=self.recorded.prompts)
        folder = self.config.llm.prompts
        return Templates(self.root / folder if folder else None)

    @cached_property
    def api_key(self) -> str | None:
        """The API key of the LLM's server: from the command line, or see `read_key`."""
        llm = self.config.llm
        return self.given_key or read_key(llm.api_key_file, self.root, "llm", llm.api_key_env, llm.base_url)

    @property
    def proposer_name(self) -> str:
        """The LLM client of the config, `auto` resolved."""
        llm = self.config.llm
        if llm.proposer != "auto":
            return llm.proposer
        return "openai" if self.api_key or llm.base_url or llm.model else "local"

    @property
    def resolved(self) -> Config:
        """The config with the LLM client that `auto` means here, where the optimizer asks one."""
        if not self.asks:
            return self.config
        llm = self.config.llm.model_copy(update={"proposer": self.proposer_name})
        return self.config.model_copy(update={"llm": llm})

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
        """The prompting style, from the log where there is one: reading a run needs no client."""
        return self.recorded.style if self.recorded else self.proposer.style

    @property
    def asks_short(self) -> bool:
        """Whether the LLM is asked in the short form: see `llm.form`."""
        form = self.config.llm.form
        return form == "short" or (form == "auto" and self.proposer_name == "local")

    @property
    def prompt_files(self) -> tuple[str, ...]:
        """The prompt templates of the optimizer, or of the style."""
        search = self.config.search
        own: tuple[str, ...] = getattr(every()[search.optimizer], "files", ())
        if search.optimizer in PATHS:
            return own if self.asks else ()
        files = own or (STYLES[self.style].files if self.asks else ())
        both = PATH_FILES if self.asks and search.spaces == "both" else ()
        return tuple(dict.fromkeys([*files, *both]))

    @cached_property
    def texts(self) -> dict[str, dict[str, list[tuple[str, str]]]]:
        """The questions of each set with their right answers; see `Evaluator.texts`."""
        return {name: evaluator.texts() for name, evaluator in self.scorer.evaluators.items()}

    @property
    def _shown_texts(self) -> dict[str, list[tuple[str, str]]]:
        """The search questions that the LLM may be shown."""
        if not self.shows_names:
            return {}
        return (self.recorded.texts if self.recorded else self.texts).get("search", {})

    def check(self) -> None:
        """Raise an error for every mistake that shows before anything is written or computed, and ask the servers."""
        self.check_config()
        if self.asks:
            self.proposer.check()
        for evaluator in self.scorer.evaluators.values():
            evaluator.check()

    def check_config(self) -> None:
        """Raise an error for every mistake in the config that shows before a server is asked."""
        rows, budget = len(self.start_rows), self.config.search.budget
        if budget.evaluations < rows or self.evaluations < rows:
            items = "" if budget.evaluations < rows else f" of {self.evaluator.items} questions each"
            some = ["the parents", "the uniform merge"]
            others = sum(row.origin == "coefficient" for row in self.start_rows)
            some += [f"{others} with another weight for all models"] if others else []
            some += ["your own recipes"] if self.own_rows else []
            some += ["a random one"] if self.config.random_init else []
            raise ConfigError(
                f"search.budget: {budget} is too low; the start rows ({', '.join(some)}) alone are {rows}"
                f" evaluations{items}"
            )
        _ = self.scan
        if self.config.search.optimizer in PATHS or self.config.search.spaces == "both":
            _ = self.space.paths  # fails for bounds that leave no path to edit
        if self.config.search.optimizer in PATHS and self.asks and self.style != "chat" and not self.recorded:
            raise ConfigError(
                f"llm.proposer: {self.proposer_name} completes texts, and layer paths are asked of a chat model; give"
                " one with llm.base_url and llm.model, or leave llm out for a search without an LLM"
            )
        needed = MAKES.get(self.config.search.optimizer, ())
        if lacking := [kind for kind in needed if kind not in self.space.paths.settings.kinds]:
            raise ConfigError(
                f"genome.path.kinds: {self.config.search.optimizer!r} makes {', '.join(needed)}, and"
                f" {', '.join(lacking)} is not among them; add it, or choose another optimizer"
            )
        self.scorer.check_filters()
        self.scorer.check_device()
        if self.order == "steady" and self.config.search.optimizer not in STEADY:
            raise ConfigError(
                f"search.order: steady asks for single candidates, and {self.config.search.optimizer!r} learns from"
                f" whole generations; give strict, or one of the optimizers {', '.join(STEADY)}"
            )
        if "cost" in budget.bounds and not (self.asks or any(task.judge for task in self.config.tasks)):
            raise ConfigError(
                f"search.budget: the cost ({budget.cost:g}) bounds nothing, for the optimizer"
                f" {self.config.search.optimizer!r} asks no LLM and none judges; give evaluations, items or minutes"
            )
        self.scorer.check_model()
        if self.asks:
            self.templates.texts(self.prompt_files)
            # A mistake in a template shows when the template is rendered, which may be much later in the search.
            search = self.config.search
            question = Question(
                self.space, (), self.config.counted, 1, 0, 0.0, 0, self.evaluations, short=self.asks_short
            )
            if search.optimizer not in PATHS:
                len(STYLES[self.style].ask(question, self.templates, search.seed).messages)
            if search.optimizer in PATHS or search.spaces == "both":
                root, *others = self.space.paths.models
                len(paths_prompt.ask(PathQuestion(question, self.space.paths, root, others), self.templates).messages)
        self.scorer.check_texts()
        _ = self.texts  # fails for a question without a right answer
        self.scorer.check_lengths()
        if self.config.gate:
            _ = self.scorer.gate_prompts

    def started(self) -> events.RunStarted:
        """The first event of a run."""
        search = self.config.search
        return events.RunStarted(
            config=self.config.model_dump(mode="json", exclude_unset=True),
            root=str(self.root),
            prompts={**self.templates.texts(self.prompt_files), **self.evaluator.judge_texts()},
            versions=versions(),
            sources=[self._described(reference) for reference in self.config.genome.references],
            seed=search.seed,
            evaluation_seed=search.evaluation_seed,
            genes=[gene.described() for gene in self.space.genes],
            layers=self.layers,
            routers=[*self.space.routers],
            items=self.evaluator.items,
            heldout_items=self.heldout.items if self.heldout else 0,
            selection_items=self.scorer.selection.items if self.scorer.selection else 0,
            rules=RULES,
            order=self.order,
            workers=self.worker_count,
            proposer=self.proposer_name if self.asks else "",
            style=self.style if self.asks else "",
            questions={**self.scorer.questions},
            texts=self.texts,
            clusters={name: evaluator.clusters for name, evaluator in self.scorer.evaluators.items()},
            groups={name: evaluator.groups for name, evaluator in self.scorer.evaluators.items()},
            geometry=[asdict(facts) for facts in self.geometry],
            cards=self.cards,
            descriptions=self.descriptions,
            chances=self.chances,
            scan={**self.scan},
            layer_parameters=self._layer_parameters[0],
            other_parameters=self._layer_parameters[1],
            active_parameters=self._active_parameters[0],
            head_parameters=self._active_parameters[1],
            vocabulary=self.scorer.vocabulary,
            start_from=[
                {"name": row.note, "genes": row.genes, **({"path": row.path} if row.path else {})}
                for row in self.own_rows
            ],
        )

    def _branches(self) -> Branches | None:
        """The branches of the first model's layers; None for an architecture whose layers are not known."""
        donor = self.config.genome.references[0]
        with suppress(SourceError):
            return Branches(self.sources[donor].shapes, self.sources.config(donor))
        return None

    @cached_property
    def scan(self) -> Scanned:
        """The effects of `genome.path.scan`, from the log where there is one. Raises ConfigError for a file that is no
        scan of these models.
        """
        if self.recorded:
            return self.recorded.scan
        given = self.config.genome.path and self.config.genome.path.scan
        if not given:
            return {}
        found = read_scan(given, self.root)
        if not any(map(self.space.paths.has_models_of, found)):
            known = ", ".join(self.space.paths.models)
            raise ConfigError(
                f"genome.path.scan: {given} is of other models: no path in it, such as {next(iter(found))!r}, is of"
                f" {known} with {plural(self.layers, 'layer')}; run `llmevo scan` with this config"
            )
        return found

    @cached_property
    def _layer_parameters(self) -> tuple[list[int], int]:
        """The parameters of each layer of the first model, and of its other tensors; none where no size
        counts.
        """
        if not self.config.objective.counts_sizes:
            return [], 0
        if self.recorded:
            return self.recorded.layer_parameters, self.recorded.other_parameters
        return self.scorer.parameters

    @cached_property
    def _active_parameters(self) -> tuple[list[int], int]:
        """Of these the ones that a token is multiplied by, in each layer and in the output head."""
        if not self.config.objective.counts_sizes:
            return [], 0
        if self.recorded:
            return self.recorded.active_parameters, self.recorded.head_parameters
        return self.scorer.active_parameters

    def _described(self, reference: Any) -> dict[str, Any]:
        return {
            "reference": str(reference),
            "revision": (reference.lora or reference.model).revision,
            "checksum": self.scorer.checksums[str(reference)],
            "config": self.sources.config_digest(reference),
            "licence": self.sources.licence(reference),
        }


def config_of(started: events.RunStarted, origin: str) -> Config:
    """Return the config of a logged run, with the LLM client that `auto` meant then, whatever keys there are now."""
    # Older runs did not need `allow_benchmark_tasks`.
    config = parse_logged({"allow_benchmark_tasks": True, **started.config}, origin)
    if started.proposer:
        return config.model_copy(update={"llm": config.llm.model_copy(update={"proposer": started.proposer})})
    return config


def population(experiment: Experiment) -> int:
    """Return the candidates a generation: the config's, or λ of CMA-ES (https://arxiv.org/abs/1604.00772, eq. 48)."""
    return experiment.config.search.population_of(len(experiment.space.genes))


def planned_evaluations(experiment: Experiment, state: RunState) -> int:
    """Return the evaluations to plan with, where need be by a forecast from what was spent."""
    if experiment.rules < 5 or not experiment.forecasts:
        return experiment.evaluations
    return len(state.trials) + Spending(experiment.config.search.budget, state).evaluations_ahead


def ask_size(experiment: Experiment, state: RunState, wanted: int | None = None) -> int:
    """Return the size of the next generation: `wanted`, by default the population, or one candidate for each worker if
    that is more; 0 when the budget has no room for another candidate, or the optimizer none left.
    """
    if experiment.exhausted:
        return 0
    return Spending(experiment.config.search.budget, state).next_size(
        wanted or max(population(experiment), experiment.worker_count)
    )
