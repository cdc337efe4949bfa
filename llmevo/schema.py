"""The sections of a config: every key, its type, its default and what it means."""

import math
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from llmevo.budget import Budget
from llmevo.errors import nearest
from llmevo.judging.settings import Price
from llmevo.optimizers import OPTIMIZERS
from llmevo.proposers import PROPOSERS


class Section(BaseModel):
    """A part of the config: an unknown key is an error, and nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


def switched(key: str, value: Any) -> Any:
    """A section that `true` turns on as it is, and `false` off."""
    if isinstance(value, str | int | float | list) and not isinstance(value, bool):
        raise ValueError(f"{key} is true, false or a mapping with its keys")
    return {} if value is True else None if value is False else value


class Racing(Section):
    """When to stop asking a candidate."""

    error_rate: float = Field(default=0.05, gt=0, lt=0.5)
    """The share, at most, of the candidates that would get ahead of the best that are stopped. See `llmevo.racing`.

    The default rests on 40 simulated searches (`benchmarks/simulator.py race`), at equally many evaluations: it saves
    39 % of the questions, and the score changes by -0.001 ± 0.003. 0.2 saves 49 %, and stops the candidate with the
    highest score in 7 of the searches.
    """
    looks: int = Field(default=5, ge=2)
    """How often it is looked: parts the questions are asked in."""
    proxy: bool = False
    """Race by how probable right choices are (`acc`, `acc_norm`), as long as that ranks the run's candidates as their
    metrics do: fewer questions tell them apart. Who wins is decided by the metrics alone. See `llmevo.proxy`."""


class Gate(Section):
    """Short replies before the tasks; see `llmevo.gate`."""

    prompts: Path | None = None
    """A file with a prompt a line. By default the first questions of the search tasks that are replied to in words, or
    where there are none, a few plain ones."""
    tokens: int = Field(default=48, ge=16)
    """Of a reply, at most."""
    share: float = Field(default=0.5, ge=0, lt=1)
    """A candidate fails when more of its replies are degenerate, and more than of any parent's."""


class Split(Section):
    """Which share of each task's questions is for what. A question's place follows from its words and the seed."""

    search: float = Field(gt=0, le=1)
    selection: float = Field(default=0.0, ge=0, lt=1)
    heldout: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.search + self.selection + self.heldout > 1 + 1e-9:
            shares = f"{self.search:g} + {self.selection:g} + {self.heldout:g}"
            raise ValueError(f"its shares are more than 1 together ({shares})")
        return self


class Search(Section):
    """How the search goes about it."""

    optimizer: str = "llm"
    """One of the optimizers; `llmevo run --help` lists them."""
    budget: Budget = Budget(evaluations=100)
    """Candidates to score, the start rows included; or a mapping of bounds, whichever ends first:
    `{evaluations: 100, items: 50000, minutes: 60, cost: 5}`. See `Budget`."""
    population: int | None = Field(default=None, ge=2)
    """Candidates a generation; 4 + ⌊3 ln genes⌋ by default, the rule of CMA-ES."""
    seed: int = Field(default=0, ge=0)
    """Everything random follows from it: candidates, random masks, the order of shuffled questions."""
    evaluation_seed: int | None = Field(default=None, ge=0)
    """Random masks, shuffled questions and solved examples follow from this one, where it is given: so searches with
    other seeds are scored alike. `llmevo compare` gives all its runs the same."""
    start_from: list[Path | dict[str, float]] = Field(default_factory=list[Path | dict[str, float]])
    """Recipes of your own to start from, scored after the parents and the uniform merges: mergekit's YAML files, or
    genes by name."""
    racing: Racing | None = Racing()
    """Stop asking a candidate once it cannot be the best; `false` asks everything of everyone. Only where every task's
    metric is a mean over its questions; else everything is asked."""
    finalists: int = Field(default=4, ge=0)
    """So many of the best, and the best parent, the uniform merge and the best other weight for all models, are asked
    further questions in the end, and the best by all they were asked is handed over: a score that was picked as the
    highest of many flatters. The questions are those of `split: {selection: …}`, or what `limit` has left of the search
    tasks, up to as many again. 0: none."""
    objective: Literal["sum", "pareto"] = "sum"
    """`sum`: the weighted sum of the tasks' metrics. `pareto`: every task is an aim of its own, and the run ends with
    those candidates than which none is better at one task without being worse at another. Of a weight only the sign
    counts then; the weighted sum says which of the front is handed over by default."""
    sigma_rule: Literal["csa", "success", "legacy", "llm"] = "csa"
    """How the `llm` optimizers adapt their step size: by the length of the path (CMA-ES), by the share of successes,
    as LLM-Evo-Merge does, or by what the LLM says of each slice."""

    def population_of(self, genes: int) -> int:
        """Candidates a generation in a space of so many genes; the default is eq. 48 of
        https://arxiv.org/abs/1604.00772.
        """
        return self.population or 4 + int(3 * math.log(max(1, genes)))

    @field_validator("racing", mode="before")
    @classmethod
    def _raced(cls, value: Any) -> Any:
        return switched("racing", value)

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer {self.optimizer!r} is unknown{nearest(self.optimizer, OPTIMIZERS)}")
        return self


class Llm(Section):
    """The LLM that proposes."""

    proposer: str = "auto"
    """`openai` (any OpenAI-compatible server), `local` (a model on this machine), `recorded` (an earlier run's
    replies), or `auto`: openai when a key, a base_url or a model is given, else local with the base model."""
    model: str | None = None
    """The server's name for it (default gpt-4o), or a model reference for `local` (default: the base model)."""
    base_url: str | None = None
    """Of a server of your own: vLLM, Ollama, llama.cpp, ..."""
    api_key_file: Path | None = None
    """A file that holds the key."""
    api_key_env: str | None = None
    """The environment variable that holds the key. Without this, `api_key_file` and `--api-key`, OPENAI_API_KEY goes to
    OpenAI's server, or to that of OPENAI_BASE_URL, and to no other."""
    temperature: float | None = Field(default=None, ge=0)
    """The server's own by default; for `local`, 0.8."""
    max_tokens: int = Field(default=4096, ge=16)
    """Of an answer, thoughts included."""
    timeout: float = Field(default=120.0, gt=0)
    """Seconds a request may take."""
    retries: int = Field(default=4, ge=0)
    """Further tries after a failure that may pass by itself."""
    prompts: Path | None = None
    """A folder whose templates replace llmevo's of the same name."""
    mask_names: bool = False
    """Hide the names of models, tasks and parameters from it, to see how much the search owes to knowing them."""
    max_calls: int | None = Field(default=None, ge=0)
    """Answers to ask for at most, repairs included; what is sent again because the server was busy counts once. Then
    the search goes on without the LLM."""
    max_cost: float | None = Field(default=None, gt=0)
    """What to spend at most, in the units of `price`: no call is made that would exceed it if it cost as much as the
    dearest so far."""
    strict: bool = False
    """Stop when the LLM is lost, resumably, instead of going on without it."""
    transcript: Path | None = None
    """For `recorded`: an earlier run's folder or events.jsonl."""
    price: Price = Price()

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.proposer not in ("auto", *PROPOSERS):
            raise ValueError(f"proposer {self.proposer!r} is unknown{nearest(self.proposer, ['auto', *PROPOSERS])}")
        if self.max_cost is not None and not (self.price.prompt or self.price.completion):
            raise ValueError(
                "max_cost needs to know what the LLM costs; add its prices per million tokens, such as"
                " `price: {prompt: 2.5, completion: 10}`"
            )
        return self


class Engine(Section):
    """Where candidates are loaded and scored."""

    backend: Literal["auto", "hf", "vllm"] = "auto"
    """`hf`: transformers, in this process. `vllm`: a vLLM engine, merged into inside its workers. `auto`: vllm where
    there are a GPU and vLLM, else hf."""
    adapters: Literal["merged", "together"] = "merged"
    """Of experts that are LoRA adapters of one base. `merged`: every candidate is merged before it is scored, and what
    is scored is what is exported, bit for bit. `together`: the candidates of a generation share batches over one copy
    of the base while searching, each row with its own candidate's weights; finalists and held-out rows are merged all
    the same. For `hf`, which `auto` then means, and methods that are linear in the models."""
    device: str | None = None
    """For `hf`: `cuda`, `cuda:1`, `cpu`; the first GPU by default."""
    options: dict[str, Any] = Field(default_factory=dict[str, Any])
    """For `vllm`: keywords of `vllm.LLM`, such as tensor_parallel_size, gpu_memory_utilization, max_model_len."""
    self_check: bool = True
    """Before the first candidate, compare one that is merged into the engine with the same one exported. Needs room
    for one model in the temporary folder."""
    cache_gb: float = Field(default=0.5, ge=0)
    """Memory, in 10⁹ bytes, for what no gene changes: norms, angles, magnitudes, ranks, products of adapters."""
