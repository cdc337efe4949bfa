"""What a run works with, made from its config: models, tasks, engine and proposer, each when it is first needed."""

import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from llmevo import events
from llmevo.config import Config
from llmevo.engines import Engine, HfEngine, VllmEngine
from llmevo.errors import ConfigError
from llmevo.evaluation import Evaluator, check_disjoint
from llmevo.merging import Merger, depth_of
from llmevo.optimizers import OPTIMIZERS, Optimizer, Setup
from llmevo.prompting import STYLES, Templates
from llmevo.proposers import PROPOSERS, Connection, Proposer
from llmevo.recipe import Recipe
from llmevo.selfcheck import check_engine
from llmevo.sources import Sources
from llmevo.space import SearchSpace
from llmevo.trial import Score

VERSIONED = ("llmevo", "torch", "transformers", "lm-eval", "openai", "safetensors")


@dataclass
class Bench:
    """Everything a run needs; nothing is loaded before it is used, so reading a finished run loads nothing."""

    config: Config
    root: Path
    """Where relative references start: the config's folder."""
    api_key: str | None = None
    recorded_style: str = ""
    """For a run that began earlier: the prompting style it began with."""

    @cached_property
    def sources(self) -> Sources:
        return Sources.open(self.config.genome.references, self.root)

    @cached_property
    def layers(self) -> int:
        return depth_of(self.sources.config(self.config.genome.references[0]))

    @cached_property
    def space(self) -> SearchSpace:
        return SearchSpace(self.config.genome, self.layers)

    @cached_property
    def evaluator(self) -> Evaluator:
        """The search tasks."""
        return Evaluator(self.config.tasks, self.config.protocol, self._search_path)

    @cached_property
    def heldout(self) -> Evaluator | None:
        """The held-out tasks; None when the config names none."""
        if not self.config.heldout:
            return None
        heldout = Evaluator(self.config.heldout, self.config.heldout_protocol, self._search_path)
        check_disjoint(self.evaluator, heldout)
        return heldout

    @property
    def _search_path(self) -> list[Path]:
        return [self.root / path for path in self.config.task_search_path]

    @cached_property
    def engine(self) -> Engine:
        """The running model, checked against an export before its first use."""
        engine, seed = self._start_engine(), self.config.search.seed
        if self.config.engine.self_check:
            for recipe in (self.space.decode(self.space.uniform()), Recipe.of_one(self.config.genome.references[0])):
                if check_engine(engine, recipe, self.sources, seed):
                    break
        return engine

    def _start_engine(self) -> Engine:
        donor = self.sources.folder(self.config.genome.references[0])
        tokenizer = self.sources.folder(self.space.decode(self.space.uniform()).tokenizer_donor)
        engine, dtype, seed = self.config.engine, self.config.genome.dtype, self.config.search.seed
        if self.backend == "vllm":
            return VllmEngine(donor, tokenizer, dtype, self.root, seed, engine.cache_gb, engine.options)
        return HfEngine(donor, tokenizer, dtype, engine.device, Merger(self.sources, seed, engine.cache_gb))

    @property
    def backend(self) -> str:
        """Which engine the config means, `auto` resolved: vLLM where there are a GPU and vLLM."""
        if self.config.engine.backend != "auto":
            return self.config.engine.backend
        return "vllm" if torch.cuda.is_available() and find_spec("vllm") else "hf"

    @cached_property
    def templates(self) -> Templates:
        folder = self.config.llm.prompts
        return Templates(self.root / folder if folder else None)

    @property
    def proposer_name(self) -> str:
        """Which proposer the config means, `auto` resolved."""
        llm = self.config.llm
        if llm.proposer != "auto":
            return llm.proposer
        return "openai" if self.api_key or llm.base_url or llm.model else "local"

    @cached_property
    def proposer(self) -> Proposer:
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
            transcript=llm.transcript,
            price=(llm.price.prompt, llm.price.completion),
        )
        return PROPOSERS[name](connection)

    @property
    def style(self) -> str:
        """How the proposer is asked; a run that is only read again needs no proposer for it."""
        return self.recorded_style or self.proposer.style

    def optimizer(self) -> Optimizer:
        """A fresh one, as the run starts with."""
        search = self.config.search
        style = self.style if search.optimizer == "llm" else ""
        setup = Setup(self.space, search.seed, search.budget, self.config.counted, style, self.templates)
        return OPTIMIZERS[search.optimizer](setup)

    def check(self) -> None:
        """Find every mistake of the user's that can be found before anything is written or computed."""
        rows = self.start_rows
        if self.config.search.budget < rows:
            raise ConfigError(
                f"search.budget: {self.config.search.budget} is too low; the parents and the uniform merge alone are"
                f" {rows} evaluations"
            )
        if self.config.search.optimizer == "llm":
            for name in STYLES[self.style].files:
                self.templates.texts([name])
            self.proposer.check()
        _ = self.evaluator, self.heldout

    @property
    def start_rows(self) -> int:
        return len(self.space.merged) + 1 + self.config.random_init

    def score(self, recipe: Recipe, evaluator: Evaluator) -> tuple[Score, Mapping[str, float]]:
        """Merge into the engine and score. Raises CandidateError. Seconds of both beside the score."""
        engine = self.engine  # made before the clock starts
        started = time.monotonic()
        engine.swap(recipe)
        merged = time.monotonic()
        score = evaluator.score(engine.lm)
        return score, {"merge": merged - started, "evaluate": time.monotonic() - merged}

    def started(self) -> events.RunStarted:
        """The first event of a run."""
        search = self.config.search
        asks = search.optimizer == "llm"
        return events.RunStarted(
            config=self.config.model_dump(mode="json", exclude_unset=True),
            root=str(self.root),
            prompts=self.templates.texts(STYLES[self.style].files if asks else ()),
            versions={"python": platform.python_version(), **{name: version(name) for name in VERSIONED}},
            sources=[self._described(reference) for reference in self.config.genome.references],
            seed=search.seed,
            genes=[gene.described() for gene in self.space.genes],
            layers=self.layers,
            items=self.evaluator.items,
            heldout_items=self.heldout.items if self.heldout else 0,
            proposer=self.proposer_name if asks else "",
            style=self.style if asks else "",
        )

    def _described(self, reference: Any) -> dict[str, Any]:
        return {
            "reference": str(reference),
            "revision": (reference.lora or reference.model).revision,
            "checksum": self.sources.checksum(reference),
            "licence": self.sources.licence(reference),
        }
