"""The scorer: recipe in, score out. It owns the models, the tasks and the engine, each loaded when first needed.

Several runs may share one scorer: everything is loaded once, and the scores of each run are known to the others. With
workers, each of them holds a scorer, and the run's own loads no engine: it says which questions are asked, and joins
their answers.
"""

import gc
import json
import math
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from llmevo.config import Config, Elastic
from llmevo.engines.base import Engine
from llmevo.errors import (
    CandidateError,
    ConfigError,
    LlmevoError,
    MachineError,
    SourceError,
    TaskError,
    machine_error,
    nearest,
)
from llmevo.evaluation.gate import PROMPTS, Gate, read_prompts
from llmevo.evaluation.judges.verdicts import VerdictMemory
from llmevo.evaluation.questions import check_disjoint
from llmevo.evaluation.responses import Responses
from llmevo.evaluation.score import Score
from llmevo.evaluation.tasks.task import AskingOptions, Task
from llmevo.merging.dense import RouterUse
from llmevo.merging.merger import Merger, not_finite
from llmevo.merging.mixture.mixture import ROUTER
from llmevo.merging.mixture.router import Router
from llmevo.merging.preparation.texts import Texts, read_texts
from llmevo.merging.recipe import QUESTIONS, Conditional, Recipe
from llmevo.merging.vocabulary import ByToken, open_models
from llmevo.merging.writer import MergedModel, merged_tokenizer
from llmevo.models.architecture import active_parameters, routers_of, stack_of, text_config
from llmevo.models.files import (
    WHOLE,
    cache_folder,
    locked,
    unread_bytes,
    write_whole,
)
from llmevo.models.placeholder import placeholder
from llmevo.models.references import ModelReference
from llmevo.models.sources import Sources
from llmevo.run.log.state import RunState
from llmevo.run.score_cache import ScoreCache, cache_key, digest
from llmevo.run.versions import VERSIONED
from llmevo.search.geometry import measure
from llmevo.search.prompts.question import SliceGeometry
from llmevo.search.space import SearchSpace
from llmevo.workers.local import Local
from llmevo.workers.pool import Pool
from llmevo.workers.processes import fitting
from llmevo.workers.protocol import Doing, Job, Request, Warn, Workers
from llmevo.workers.shared import SharedWorkers

if TYPE_CHECKING:  # engines and lm-eval take seconds to import; scoring alone needs them
    from llmevo.evaluation.evaluator import Evaluator

LARGE = 4 * 10**9
"""Bytes that take more than a few seconds to read."""

ROUTED = 64
"""Questions of a task on which the routing of a mixture is shown."""

RECOVERABLE = ("memory", "engine")
"""Kinds of MachineError after which scoring is tried once more: memory may be free again, vLLM can be restarted."""

FITTING = "fitting routers"
"""The name under which experts are scored for the routers of a mixture, as if another run had asked."""

Scored = TypeVar("Scored")


@dataclass
class Scorer:
    """The models, tasks and engine of a config. Its `search:` and `llm:` have no effect but for the evaluation seed."""

    config: Config
    root: Path
    """The folder that relative references start from: the config's."""
    cache: ScoreCache = field(default_factory=ScoreCache)
    """Every score so far."""
    verdicts: VerdictMemory = field(default_factory=VerdictMemory)
    """The verdicts of judges and voters."""
    verdicts_of: dict[str, VerdictMemory] = field(default_factory=dict[str, VerdictMemory])
    """The same of each run, where several runs share the scorer."""
    run: str = ""
    """The run that is scored now, where that happens in this process."""
    judges: bool = True
    """Whether judges and voters are asked here: not by a worker, which sends the replies to the run."""
    warn: Warn = field(default=lambda _: None)
    _spent_preparing: float = field(default=0.0, init=False)
    _swapped: float | None = field(default=None, init=False)
    """When the merge of the recipe in hand began, by `time.monotonic`; None before."""
    unselected: str = ""
    """Why there are no selection questions though the config asks for them, once `selection` is loaded."""

    # Models

    @cached_property
    def sources(self) -> Sources:
        """The models, by token where the config asks for it and their tokens differ. Raises SourceError unless they fit
        each other.
        """
        genome = self.config.genome
        if genome.tokenizer_source in (None, "base"):
            return Sources.open(genome.references, self.root)
        depth = Sources(self.root).depth(genome.references[0])
        sources = open_models(SearchSpace(genome, depth, by_token=True).alone(genome.references[0]), self.root)
        pairs = [method.name for method in genome.methods if method.pair and len(genome.merged(method)) > 2]
        if pairs and isinstance(sources, ByToken):
            raise ConfigError(
                f"genome.tokenizer_source: the models' tokens differ, and {pairs[0]} merges only two of the"
                f" {len(genome.merged(genome.methods[0]))} models at a time, so its candidates would lack tokens of the"
                " others; choose another merge_method, or two models"
            )
        return sources

    @property
    def vocabulary(self) -> str:
        """A digest of the candidates' tokens where embeddings are merged by token; else empty."""
        return self.sources.vocabulary.digest if isinstance(self.sources, ByToken) else ""

    @cached_property
    def checksums(self) -> Mapping[str, str]:
        """{reference: checksum} of every model."""
        references = self.config.genome.references
        size = unread_bytes(file for reference in references for file in self.sources.files(reference))
        if size > LARGE:
            self.warn(f"Reading {size / 1e9:.0f} GB of models for their checksums; they are remembered.")
        return {str(reference): self.sources.checksum(reference) for reference in references}

    def checksum_as(self, reference: ModelReference, recorded: str) -> str:
        """Return a model's checksum by the rule that a recorded one was made by."""
        if recorded.startswith(WHOLE):
            return self.checksums[str(reference)]
        return self.sources.checksum(reference, recorded)

    @cached_property
    def layers(self) -> int:
        return self.sources.depth(self.config.genome.references[0])

    @property
    def parameters(self) -> tuple[list[int], int]:
        """The number of parameters of each layer of the first model, and of its other tensors."""
        donor = self.config.genome.references[0]
        shapes = self.sources[donor].shapes
        stack, counted, others = stack_of(self.sources.config(donor), shapes), [0] * self.layers, 0
        for name, shape in shapes.items():
            layer = stack.layer(name)
            if layer is None:
                others += math.prod(shape)
            else:
                counted[layer] += math.prod(shape)
        return counted, others

    @property
    def active_parameters(self) -> tuple[list[int], int]:
        """The parameters of the first model that a token is multiplied by: in each layer, and in the output head."""
        donor = self.config.genome.references[0]
        return active_parameters(self.sources.config(donor), self.sources[donor].shapes)

    @cached_property
    def routers(self) -> list[str]:
        """Filters for the routers of a mixture of experts; empty for dense models."""
        donor = self.config.genome.references[0]
        return routers_of(self.sources[donor].shapes, self.sources.config(donor))

    @cached_property
    def space(self) -> SearchSpace:
        return SearchSpace(self.config.genome, self.layers, self.routers, bool(self.vocabulary))

    @cached_property
    def geometry(self) -> list[SliceGeometry]:
        """Norms of and cosines between the task vectors of each slice; reads the weights."""
        return measure(self.space, self.sources)

    @cached_property
    def tokenizer_folder(self) -> Path:
        """The folder with the tokenizer of every candidate."""
        if self.vocabulary:
            return merged_tokenizer(self.space.alone(self.config.genome.references[0]), self.sources)
        return merged_tokenizer(self.space.decode(self.space.uniform()), self.sources)

    # Preparation

    @property
    def texts(self) -> Texts:
        """The search questions, on which a preparation measures the inputs of layers, as the model reads them."""
        return self._texts_of(self.evaluator)

    def _texts_of(self, evaluator: "Evaluator") -> Texts:
        from llmevo.models.tokenizer import load_tokenizer

        found: dict[str, list[str]] = {}
        for task, text in evaluator.questions():
            found.setdefault(task, []).append(text)
        if self.config.apply_chat_template:
            chat = partial(load_tokenizer(self.tokenizer_folder).apply_chat_template, tokenize=False)
            found = {
                task: [str(chat([{"role": "user", "content": text}], add_generation_prompt=True)) for text in texts]
                for task, texts in found.items()
            }
        return Texts(found)

    def localized(self, recipe: Recipe) -> Recipe:
        """Return a recipe of the run as it is merged here, with the file of its texts; all that a preparation needs of
        the models is measured then.
        """
        if recipe.mixture and recipe.mixture.router == ROUTER:
            recipe = recipe.with_router(str(self._kept_router))
        if recipe.prepare is None:
            return recipe
        if recipe.prepare.text == QUESTIONS:
            recipe = recipe.with_text(self._kept_texts)
        key = repr((recipe.prepare, recipe.references))
        if key not in self._prepared_keys:
            self._prepare(recipe)
            self._prepared_keys.add(key)
        return recipe

    def merge(self, recipe: Recipe, quantize: str = "") -> None:
        """Merge a recipe of the run into the running model."""
        self.engine.swap(self.localized(recipe), quantize)

    @property
    def router(self) -> str:
        """The text of the run's router."""
        return self._kept_router.read_text()

    @cached_property
    def _kept_router(self) -> Path:
        """The file of the routers that are fitted on the search questions and each expert's scores on them.

        It scores each expert alone, which a run does anyway, and runs a merge on the questions once: see
        `SearchSpace.typical`. Of several workers the first one does so, and the others wait.
        """
        assert self.space.routing
        experts, dense = [*self.space.routing.experts], self.space.typical.model_copy(update={"mixture": None})
        own = [self.questions.get("prepare.text")] if dense.prepare else []
        asked = self.questions["search"]
        key = digest("router 1", {**self.checksums}, asked, [*map(str, experts)], dense.as_dict(), *own)
        file = (cache_folder() / "routers" / f"run-{key[:24]}.json").absolute()
        with locked(file.parent):
            if not file.exists():
                write_whole(file, self._fitted(experts, dense).to_json().encode())
        return file

    def _fitted(self, experts: Sequence[ModelReference], dense: Recipe) -> Router:
        """Return the routers that are fitted in a dense merge."""
        from llmevo.run.calibration.routers import expert_scores, fitted

        # As another run's, so that the parents of this one are raced whether or not the routers were in the cache.
        run, self.run = self.run, FITTING
        try:
            scored = [self.score(self.space.alone(expert)) for expert in experts]
        finally:
            self.run = run
        dense = self.localized(dense)
        started = time.monotonic()
        texts = self.texts.tasks
        self.warn(f"Fitting the routers of {len(experts)} experts on {sum(map(len, texts.values()))} questions…")
        weights = {task.name: task.weight for task in self.config.tasks}
        scores = [score for score, _ in scored]
        table = expert_scores(scores, {task: len(of) for task, of in texts.items()}, weights, self.config.counted)
        device, all_texts = self.config.engine.device, [text for of in texts.values() for text in of]
        router = fitted(dense, table, all_texts, self.sources, self.tokenizer_folder, device)
        self._spent_preparing += time.monotonic() - started + sum(sum(seconds.values()) for _, seconds in scored)
        return router

    def routing(self, recipe: Recipe) -> str:
        """Return a mixture's routing as JSON: the share of the routed weight of each expert by task and layer, on the
        held-out questions or, without, the search questions: {"experts": names, "shares": {task: (layers, experts)}}.
        """
        from llmevo.engines.hf import HfEngine
        from llmevo.run.calibration.router_use import routed_shares

        assert recipe.mixture
        engine = self.engine
        assert isinstance(engine, HfEngine)
        self.merge(recipe)
        every = self._texts_of(self.heldout or self.evaluator).tasks
        some = {task: texts[:ROUTED] for task, texts in every.items()}
        tasks = [task for task, texts in some.items() for _ in texts]
        shares = routed_shares(engine, recipe.mixture, tasks, [text for texts in some.values() for text in texts])
        names = [self.space.names[expert] for expert in recipe.mixture.experts]
        return json.dumps({"experts": names, "shares": shares}) + "\n"

    @cached_property
    def _kept_texts(self) -> str:
        return self.texts.keep()

    @cached_property
    def _prepared_keys(self) -> set[str]:
        return set()

    def _preparing(self) -> dict[str, float]:
        """The seconds that preparing took since the last call, for the log's `seconds`; empty if none."""
        spent, self._spent_preparing = self._spent_preparing, 0.0
        return {"prepare": spent} if spent else {}

    def _prepare(self, recipe: Recipe) -> None:
        """Make the prepared models of a recipe, and say what it cost.

        Of the workers of one machine the first one does so, and the others wait.
        """
        prepared = Merger(self.sources).prepared(recipe)
        assert prepared
        if prepared.is_done:
            return
        from llmevo.run.calibration.layer_inputs import make_prepared

        device = self.config.engine.device
        if made := make_prepared(prepared, self.sources, self.tokenizer_folder, device, self.warn):
            cost, took = made
            self._spent_preparing += cost.seconds + took
            self.warn(f"Prepared {len(prepared.experts)} models in {took:.0f} s{prepared.without}.")

    def router_use(self, mixture: ModelReference) -> RouterUse:
        """Return how much a mixture uses its experts on the search questions; measured where the cache lacks it."""
        from llmevo.run.calibration.router_use import router_use

        use = router_use(mixture, self.root, self.texts, self.config.engine.device, self.warn)
        if use.seconds:
            self.warn(f"Measured: {use.tokens} tokens of {use.texts} texts in {use.seconds:.0f} s.")
            self._spent_preparing += use.seconds
        return use

    # Checks of the config against models and machine

    def check_filters(self) -> None:
        """Raise ConfigError for a filter that no tensor has in its name: its genes would change nothing."""
        reference = self.config.genome.references[0]
        names = [*self.sources[reference].shapes]
        parts = dict.fromkeys(part for name in names for part in name.split(".") if not part.isdigit())
        for filter_ in self.config.genome.filters or []:
            if not Conditional(value=0.0, filter=filter_).holds("") and not any(filter_ in name for name in names):
                raise ConfigError(
                    f"genome.filters: no tensor of {reference} has {filter_!r} in its name"
                    f"{nearest(filter_, parts)}; a tensor's name is such as {names[len(names) // 2]!r}"
                )

    def check_device(self) -> None:
        """Raise ConfigError for an `engine.device` that torch does not have here, and for vLLM where it is missing."""
        engine = self.config.engine
        if engine.on == "ray":
            return
        if self.backend == "vllm":
            from llmevo.engines.vllm import check_installed

            check_installed()
            if engine.device is not None:
                raise ConfigError(
                    f"engine.device: it is {engine.device!r}, and vLLM does not use it; leave it out and choose GPUs"
                    " with the environment variable CUDA_VISIBLE_DEVICES, or set `backend: hf`"
                )
        elif engine.options and engine.backend == "hf":
            raise ConfigError(
                f"engine.options: {', '.join(engine.options)}: they are vLLM's, and `backend: hf` has none; leave them"
                " out, or set `backend: vllm`"
            )
        elif engine.device is not None:
            try:
                torch.empty(0, device=engine.device)
            except (RuntimeError, AssertionError) as error:
                reason = str(error).splitlines()[0]
                why = "" if reason.startswith("Expected one of") else f" ({reason})"  # a list of all devices of torch
                known = "cpu, cuda or cuda:N" if torch.cuda.is_available() else "cpu"
                raise ConfigError(
                    f"engine.device: {engine.device!r} cannot be used{why}; give {known}, or leave it out"
                ) from error

    def check_model(self) -> None:
        """Raise SourceError unless the engine can run the first model, no merge loses a tensor, and the first model's
        tokenizer has an end token and, where it is applied, a chat template that can be rendered. Reads no weights.
        """
        from llmevo.engines.checks import check_loadable
        from llmevo.models.tokenizer import check_chat_template, load_tokenizer

        check_loadable(*self.engine_model, in_place=self.backend == "hf")
        Merger(self.sources).check(self.space.decode(self.space.uniform()))
        folder = self.tokenizer_folder
        tokenizer = load_tokenizer(folder)
        if tokenizer.eos_token_id is None:
            raise SourceError(f"{folder}: the tokenizer has no end token; add eos_token to its tokenizer_config.json")
        if self.config.apply_chat_template:
            models = {each.model.name: self.sources.folder(each) for each in self.config.genome.references}
            check_chat_template(folder, tokenizer, models)

    def check_texts(self) -> None:
        """Raise RecipeError for a task of `prepare.tasks` that the texts of the preparation lack, and for a file of
        texts that cannot be read.
        """
        prepare = self.config.genome.prepare
        if prepare is None:
            return
        if prepare.text:
            read_texts(prepare.text, self.root).check(prepare.named_tasks, prepare.text)
        elif prepare.named_tasks:
            searched: dict[str, list[str]] = {task: [] for task, _ in self.evaluator.questions()}
            Texts(searched).check(prepare.named_tasks, "`tasks:`")

    def check_lengths(self) -> None:
        """Raise TaskError for a task whose replies may be as long as the model's context."""
        if (context := self.context) is None:
            return
        for evaluator in self.evaluators.values():
            for task, written in evaluator.reply_tokens.items():
                if written >= context:
                    raise TaskError(
                        f"tasks: {task}: max_gen_toks: {written} leaves no token of the {context} that the model reads"
                        " for the question; give less (reply_tokens where a judge or a person reads the replies)"
                    )

    # Tasks

    @cached_property
    def evaluator(self) -> "Evaluator":
        """The search tasks."""
        return self._load_tasks(self.config.tasks, self.config.asking, benchmarks=self.config.allow_benchmark_tasks)

    @cached_property
    def heldout(self) -> "Evaluator | None":
        """The held-out tasks; None when the config names none."""
        if not self.config.heldout_tasks:
            return None
        heldout = self._load_tasks(self.config.heldout_tasks, self.config.heldout_asking)
        for other in (self.evaluator, self.selection):
            check_disjoint("heldout", heldout.compared(), other.compared() if other else ())
        return heldout

    @cached_property
    def selection(self) -> "Evaluator | None":
        """The search tasks on questions that the search does not ask; None unless every task has some."""
        asking = self.config.selection_asking
        if asking is None:
            return None
        if self.config.split:
            selection = self._load_tasks(self.config.tasks, asking)
            check_disjoint("selection", selection.compared(), self.evaluator.compared())
            return selection
        searched = [text for _, text in self.evaluator.questions()]  # two tasks may ask the same question
        try:
            return self._load_tasks(self.config.tasks, asking, without=searched)
        except TaskError as error:
            self.unselected = str(error)
            return None  # `limit` leaves no question

    @property
    def evaluators(self) -> "Mapping[str, Evaluator]":
        """`search`, and `selection` and `heldout` where the config has them."""
        every = {"search": self.evaluator, "selection": self.selection, "heldout": self.heldout}
        return {name: evaluator for name, evaluator in every.items() if evaluator}

    def _load_tasks(self, tasks: Sequence[Task], asking: AskingOptions, **options: Any) -> "Evaluator":
        from llmevo.evaluation.evaluator import Evaluator

        search_path = [self.root / path for path in self.config.task_search_path]
        return Evaluator(tasks, asking, search_path, self.root, verdicts=self.verdicts, judges=self.judges, **options)

    @cached_property
    def questions(self) -> Mapping[str, str]:
        """A digest of the questions of each evaluator, of how they are asked, of the engine and of tokens that differ
        among the models: equal ones give equal scores. `prepare.text` is that of the user's texts for a preparation.
        """
        tokens = (self.vocabulary,) if self.vocabulary else ()
        found = {name: digest(self.backend, evaluator.digest, *tokens) for name, evaluator in self.evaluators.items()}
        prepare = self.config.genome.prepare
        return found | (
            {"prepare.text": read_texts(prepare.text, self.root).digest} if prepare and prepare.text else {}
        )

    @cached_property
    def gate_prompts(self) -> list[str]:
        """The prompts of the gate. Raises ConfigError for a file that cannot be read."""
        if self.config.gate and self.config.gate.prompts:
            return read_prompts(self.root / self.config.gate.prompts)
        return self.evaluator.prompts(len(PROMPTS)) or [*PROMPTS]

    @cached_property
    def gate(self) -> Gate | None:
        """The gate, calibrated on the parents' replies; None without one, and where it would pass everything. Changes
        the running model.
        """
        given = self.config.gate
        if not given:
            return None
        gate = Gate(self.gate_prompts, given.tokens, given.share, self.config.apply_chat_template)
        gate = gate.calibrated(self._parents())
        if gate.warning:
            self.warn(gate.warning)
        return None if gate.idle else gate

    def _parents(self) -> Iterator[tuple[str, Any]]:
        """Yield each parent's name, and the running model as that parent."""
        for model in self.space.merged:
            self.merge(self.space.decode(self.space.parent(model)), self.config.engine.search_format)
            yield self.space.names[model], self.engine.lm

    # Engine

    @property
    def backend(self) -> str:
        """The engine of the config; `auto` is vLLM where there are a GPU and vLLM, else hf."""
        if self.config.engine.backend != "auto":
            return self.config.engine.backend
        if self.config.genome.architecture == "moe" or self.config.engine.device is not None:
            return "hf"
        return "vllm" if torch.cuda.is_available() and find_spec("vllm") else "hf"

    @cached_property
    def engine(self) -> Engine:
        """The running model, compared with an exported merge before its first use (`engine.self_check`)."""
        from llmevo.engines.checks import check_engine

        if prepared := self.space.sum_of_prepared():
            self.localized(prepared)  # before the engine: measuring takes a model's memory
        engine, seed = self._start_engine(), self.config.evaluation_seed
        if self.config.engine.self_check:
            uniform = self._checked
            if not check_engine(engine, uniform, self.sources, seed):
                self._check_finite(uniform)
                check_engine(engine, self.space.alone(self.config.genome.references[0]), self.sources, seed)
        return engine

    @property
    def _checked(self) -> Recipe:
        """The uniform merge; of mixtures with routers of zeros, as theirs are fitted with the engine."""
        uniform = self.space.decode(self.space.uniform())
        if uniform.mixture is None:
            return self.localized(uniform)
        config = text_config(self.sources.config(uniform.donor))
        zeros = Router.of_copies(self.layers, len(uniform.mixture.experts), int(config["hidden_size"]))
        return self.localized(uniform.with_router(str(zeros.keep())))

    @property
    def context(self) -> int | None:
        """The tokens of the longest text that the engine reads; None where the first model's config does not say."""
        holds = text_config(self.sources.config(self.config.genome.references[0])).get("max_position_embeddings")
        holds = holds if isinstance(holds, int) else None
        if self.backend != "vllm":
            return holds
        from llmevo.engines.vllm import longest_text

        return longest_text(holds, self.config.engine.options)

    @property
    def deepest(self) -> int | None:
        """The most layers of a candidate where the search tries layer paths, else None."""
        return self.space.paths.deepest if self.config.has_paths else None

    @cached_property
    def engine_model(self) -> tuple[Path, Mapping[str, tuple[int, ...]]]:
        """The folder that the engine starts from, and the shapes of its weights: of a mixture one with zeros."""
        donor = self.config.genome.references[0]
        if self.space.routing is None:
            return self.sources.engine_folder(donor), self.sources[donor].shapes
        made = MergedModel(self.space.alone(donor), self.sources)
        dtype: torch.dtype = getattr(torch, self.config.genome.dtype)
        return placeholder(made.config(), made.shapes, dict.fromkeys(made.shapes, dtype)), made.shapes

    def _start_engine(self) -> Engine:
        self.check_model()
        folder = self.engine_model[0]
        engine, dtype, seed = self.config.engine, self.config.genome.dtype, self.config.evaluation_seed
        if self.backend == "vllm":
            from llmevo.engines.vllm import VllmEngine, deepened

            named = self.space.alone(self.config.genome.references[0])
            if self.deepest:
                folder = deepened(named, self.sources, self.deepest)
            return VllmEngine(
                folder,
                self.tokenizer_folder,
                dtype,
                self.root,
                seed,
                engine.cache_gb,
                engine.options,
                base=self.sources.base,
                by_token=named if self.vocabulary else None,
                deepest=self.deepest,
            )
        from llmevo.engines.hf import HfEngine

        merger = Merger(self.sources, seed, engine.cache_gb)
        return HfEngine(folder, self.tokenizer_folder, dtype, engine.device, merger, seed)

    def _check_finite(self, recipe: Recipe) -> None:
        """Name the models with weights that are NaN or infinite: raise SourceError for the base, which every merge
        contains, and warn of others.
        """
        base = recipe.base_model
        if base and (reason := not_finite(self.sources, [base])):
            raise SourceError(reason)
        if reason := not_finite(self.sources, recipe.references):
            self.warn(reason)

    # Scoring

    def score(
        self, recipe: Recipe, questions: str = "search", rivals: Sequence[Score] = (), quantize: str = ""
    ) -> tuple[Score, Mapping[str, float]]:
        """Return the score on the questions of `search`, `selection` or `heldout`, and the seconds of merging and
        scoring, which are empty for a known score. `quantize`: see `Request`.

        With rivals, the best first, racing stops the recipe once it cannot get ahead of that one; met again, it goes on
        from there. Raises CandidateError, and MachineError when memory, the engine or a file is lost and a second try
        does not help.
        """
        evaluator, racing = self.evaluators[questions], self.config.racing
        request = Request("", recipe, questions, rivals, self.run, quantize)
        known = self.known(request)
        if known and known.items == evaluator.items:
            return known, {}
        raced = racing if self.is_raced(request) else None
        if known and raced and (stopped := self.stopped(request, known)):
            return stopped, {}

        def scored() -> tuple[Score, dict[str, float]]:
            merging = self._swap(recipe, questions, quantize, gated=not known)
            self._note_verdicts(self.run, questions)
            started, lm = time.monotonic(), self.engine.lm
            score = evaluator.race(lm, rivals, raced.error_rate, known) if raced else evaluator.score(lm, known)
            return score, {"merge": merging, "evaluate": time.monotonic() - started, **self._preparing()}

        score, seconds = self._with_recovery(scored)
        self.keep(request, score)
        return score, seconds

    def _swap(self, recipe: Recipe, questions: str, quantize: str, gated: bool) -> float:
        """Merge a recipe into the running model and, in the search, let the gate check it if `gated`; return the
        seconds, without those of starting the engine, of calibrating the gate and of preparing models.
        """
        engine = self.engine
        searching = questions == "search" and quantize == self.config.engine.search_format  # as the gate is calibrated
        gate = self.gate if gated and searching else None
        localized = self.localized(recipe)
        self._swapped = started = time.monotonic()
        engine.swap(localized, quantize)
        if gate:
            gate.check(engine.lm)
        return time.monotonic() - started

    # With workers: see `llmevo.workers.protocol`

    @cached_property
    def workers(self) -> Workers:
        """The workers of the config, started when they are first used."""
        settings = self.config.engine
        if self.is_local:
            if (voted := self._voted) and (settings.on or settings.workers not in ("auto", 1)):
                self.warn(
                    f"engine.workers: {voted} is voted on by a person, one candidate after the other; all are scored in"
                    " this process"
                )
            return Local(self._score_here)
        from llmevo.workers.start import start_workers

        here = torch.cuda.is_available() and settings.device != "cpu"  # on Ray the cluster's GPUs count
        return start_workers(
            self.scorer_factory(),
            self,
            self.facts(),
            self.count_workers(),
            least=settings.workers.min if isinstance(settings.workers, Elastic) else None,
            on=settings.on or "processes",
            address=settings.address,
            gpus=settings.gpus if settings.on == "ray" else (settings.gpus or 1.0) if here else 0.0,
        )

    def scorer_factory(self) -> Callable[[], "Scorer"]:
        """Return what makes the scorer of a worker."""
        return partial(open_scorer, self._resolved(), self.root.absolute())

    def _resolved(self) -> Config:
        """The config for workers: what `auto` means is decided here, for a machine of a cluster may have other GPUs."""
        engine, options = self.config.engine, {**self.config.engine.options}
        if engine.on == "ray" and engine.gpus and engine.gpus > 1:
            # All GPUs of a worker are on one machine; vLLM's own actors would wait for others.
            options = {"distributed_executor_backend": "mp", **options}
        return self.config.model_copy(
            update={"engine": engine.model_copy(update={"backend": self.backend, "options": options})}
        )

    def _score_here(self, request: Request) -> tuple[Score, Mapping[str, float]]:
        self.run = request.run
        return self.score(request.recipe, request.questions, request.rivals, request.quantize)

    @property
    def doing(self) -> Sequence[Doing]:
        """What each worker of a pool does now; none before they are started. Starts none."""
        workers = vars(self).get("workers")
        return workers.doing if isinstance(workers, Pool) else ()

    def count_workers(self) -> int:
        """Return the most workers that the config asks for; `auto` is one for each of this machine's GPUs."""
        if self._voted:
            return 1
        if self.config.genome.architecture == "moe" and any(task.judge for task in self.config.tasks):
            return 1  # routers are fitted from scores, which a worker cannot give where a judge does
        if (count := self.config.engine.most_workers) is not None:
            return count
        return max(1, fitting(torch.cuda.device_count(), self.config.engine.gpus or 1.0))

    @property
    def is_local(self) -> bool:
        """Whether candidates are scored in this process."""
        return bool(self._voted) or (self.count_workers() == 1 and self.config.engine.on is None)

    @property
    def _voted(self) -> str:
        """A task that a person votes on: who compares with earlier candidates, so these come one after the other."""
        return next((task.name for task in (*self.config.tasks, *self.config.heldout) if task.votes), "")

    def share(self, run: str) -> Workers:
        """Return the workers as one of several runs sees them."""
        workers = self.workers
        if isinstance(workers, Pool):
            return SharedWorkers(workers.queue_for(run, self.verdicts_of[run].waiting), run)
        return SharedWorkers(workers, run)

    def close(self) -> None:
        """End the workers, where there are any."""
        if workers := vars(self).pop("workers", None):
            workers.close()

    def facts(self) -> Mapping[str, Any]:
        """See `PartScorer.facts`."""
        packages = [*VERSIONED, "vllm"] if self.backend == "vllm" else VERSIONED
        return {
            "engine": self.backend,
            "dtype": self.config.genome.dtype,
            "seed": self.config.evaluation_seed,
            "version of": {name: version(name) for name in packages},
            "model": {**self.checksums},
            "questions of": {**self.questions},
        }

    def start(self) -> None:
        """Load the engine and check it."""
        _ = self.engine

    def score_part(self, job: Job) -> tuple[Score | Responses, Mapping[str, float]]:
        """See `PartScorer.score_part`."""
        evaluator = self.evaluators[job.questions]
        ask = evaluator.responses if evaluator.is_judged(job.part) else evaluator.score_block

        def scored() -> tuple[Score | Responses, Mapping[str, float]]:
            merging = self._swap(job.recipe, job.questions, job.quantize, gated=job.part == 0)
            started = time.monotonic()
            score = ask(self.engine.lm, job.part)
            return score, {"merge": merging, "evaluate": time.monotonic() - started, **self._preparing()}

        return self._with_recovery(scored)

    def asks_judges(self, questions: str) -> bool:
        return self.evaluators[questions].is_judged(0)

    def judged(self, job: Job, responses: Responses, run: str) -> Score:
        from llmevo.evaluation.recording import Replay

        with self._judging(self.verdicts_of.get(run, self.verdicts)):
            self._note_verdicts(run, job.questions)
            return self.evaluators[job.questions].score_block(Replay(responses), job.part)

    @contextmanager
    def _judging(self, memory: VerdictMemory) -> Generator[None]:
        """Let one run at a time use the tasks: they hold the replies that are judged."""
        locked = False
        try:
            with memory.waiting():
                locked = self._tasks_used.acquire()
            yield
        finally:
            if locked:
                self._tasks_used.release()

    @cached_property
    def _tasks_used(self) -> threading.Lock:
        return threading.Lock()

    def _note_verdicts(self, run: str, questions: str) -> None:
        """Let the judges and voters of these questions use the memory of a run."""
        memory = self.verdicts_of.get(run, self.verdicts)
        memory.questions = questions
        self.evaluators[questions].note_in(memory)

    def known(self, request: Request) -> Score | None:
        """See `Scoring.known`, also for the next ones.

        What other runs know saves time and changes nothing: a raced recipe is not known by more questions than it would
        be asked. So a run of a comparison is what it would be alone.
        """
        evaluator, key, racing = self.evaluators[request.questions], self._key(request), self.config.racing
        own, raced = self.cache.by_run.get((request.run, key)), self.is_raced(request)

        def usable(score: Score) -> bool:
            if score.items != evaluator.items and not evaluator.parts_of(score):
                return False
            if score is own or not (raced and racing):
                return True
            return bool(score.item_scores) and evaluator.outlasts(score, request.rivals, racing.error_rate)

        others = self.cache.of_all(key)
        every = [own, *others] if own and raced else [*others, own] if own else others
        return next(filter(usable, every), None)

    def parts(self, questions: str) -> list[int]:
        return [sum(map(len, block.values())) for block in self.evaluators[questions].blocks]

    def is_raced(self, request: Request) -> bool:
        return bool(self.config.racing and request.rivals and len(self.parts(request.questions)) > 1)

    def join(self, questions: str, parts: Sequence[Score]) -> Score:
        return self.evaluators[questions].joined(parts)

    def stopped(self, request: Request, score: Score) -> Score | None:
        racing = self.config.racing
        assert racing
        return self.evaluators[request.questions].stopped(score, request.rivals, racing.error_rate)

    def keep(self, request: Request, score: Score) -> None:
        self.cache.keep(request.run, self._key(request), score)

    def control(self) -> Job:
        return Job("control", self.space.decode(self.space.uniform()), "search", 0)

    def _key(self, request: Request) -> str:
        questions = self.questions[request.questions]
        searched = self.questions["search"]
        return cache_key(
            request.recipe, self.checksums, questions, self.config.evaluation_seed, request.quantize, searched
        )

    def _with_recovery(self, scored: Callable[[], Scored]) -> Scored:
        """Return what `scored` returns, tried a second time after memory ran out or the engine died."""
        self._swapped = None
        try:
            with _machine_errors():
                return scored()
        except CandidateError as error:
            error.seconds = None if self._swapped is None else time.monotonic() - self._swapped
            raise
        except MachineError as error:
            if error.kind not in RECOVERABLE:
                raise
            kind = error.kind
            self.warn(f"{error}. It is tried once more")
        # Outside of the handler: the error's traceback holds on to the memory that is to be freed.
        engine: Engine | None = vars(self).pop("engine", None) if kind == "engine" else None
        if engine:
            with suppress(Exception):
                engine.close()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        with _machine_errors():
            if kind == "engine":
                try:
                    _ = self.engine
                except ConfigError as error:  # the first engine started with the same config
                    raise MachineError(f"the engine died and cannot be started again: {error}", "engine") from error
            return scored()

    # Known scores

    def remember(self, state: RunState, run: str = "") -> None:
        """Take over the scores of a run's log. Scores of other models or questions have other keys."""
        started = state.started
        if started is None or not started.questions or any(event.forced for event in state.resumed):
            return  # it is not known which models and questions those scores are of
        self.cache.take_over(state, {source["reference"]: self._as_now(source) for source in started.sources}, run)

    def _as_now(self, source: Mapping[str, Any]) -> str:
        """Return a recorded checksum by today's rule, where the model is still the recorded one."""
        recorded, reference = source["checksum"], source["reference"]
        if not recorded or recorded.startswith(WHOLE):
            return recorded
        try:
            is_same = self.sources.checksum(ModelReference.parse(reference), recorded) == recorded
            return self.checksums[reference] if is_same and reference in self.checksums else recorded
        except SourceError:  # a finished run needs no models
            return recorded


def open_scorer(config: Config, root: Path) -> Scorer:
    """Return the scorer of a config, in the process of a worker."""
    return Scorer(config, root, judges=False)


@contextmanager
def _machine_errors() -> Generator[None]:
    """Replace errors of libraries that mean a lost machine by MachineError; other errors pass."""
    try:
        yield
    except LlmevoError:
        raise
    except Exception as error:
        if found := machine_error(error):
            raise found from error
        raise
