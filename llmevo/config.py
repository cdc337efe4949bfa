"""The config of a run: every key, its type, its default and what it means."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from llmevo.aims import Aims, Constraint
from llmevo.budget import Budget
from llmevo.errors import ConfigError, nearest
from llmevo.genome import Genome
from llmevo.judging.settings import Price
from llmevo.loggers import read_loggers
from llmevo.optimizers import OPTIMIZERS
from llmevo.proposers import PROPOSERS
from llmevo.tasks import Protocol, Task


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


def _switched(key: str, value: Any) -> Any:
    """A section that `true` turns on as it is, and `false` off."""
    if isinstance(value, str | int | float | list) and not isinstance(value, bool):
        raise ValueError(f"{key} is true, false or a mapping with its keys")
    return {} if value is True else None if value is False else value


class Racing(_Section):
    """When to stop asking a candidate."""

    error_rate: float = Field(default=0.05, gt=0, lt=0.5)
    """The share, at most, of the candidates that would get ahead of the best that are stopped. See `llmevo.racing`."""
    looks: int = Field(default=5, ge=2)
    """How often it is looked: parts the questions are asked in."""


class Gate(_Section):
    """Short replies before the tasks; see `llmevo.gate`."""

    prompts: Path | None = None
    """A file with a prompt a line. By default the first questions of the search tasks that are replied to in words, or
    where there are none, a few plain ones."""
    tokens: int = Field(default=48, ge=16)
    """Of a reply, at most."""
    share: float = Field(default=0.5, ge=0, lt=1)
    """A candidate fails when more of its replies are degenerate, and more than of any parent's."""


class Split(_Section):
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


class Search(_Section):
    """How the search goes about it."""

    optimizer: str = "llm"
    """One of the optimizers; `llmevo run --help` lists them."""
    budget: Budget = Budget(evaluations=100)
    """Candidates to score, the parents and the uniform merge included; or a mapping of bounds, whichever ends first:
    `{evaluations: 100, items: 50000, minutes: 60, cost: 5}`. See `Budget`."""
    population: int | None = Field(default=None, ge=2)
    """Candidates a generation; 4 + ⌊3 ln genes⌋ by default, the rule of CMA-ES."""
    seed: int = 0
    """Everything random follows from it: candidates, random masks, the order of shuffled questions."""
    evaluation_seed: int | None = None
    """Random masks, shuffled questions and solved examples follow from this one, where it is given: so searches with
    other seeds are scored alike. `llmevo compare` gives all its runs the same."""
    start_from: list[Path | dict[str, float]] = Field(default_factory=list[Path | dict[str, float]])
    """Recipes of your own to start from, scored after the parents and the uniform merge: mergekit's YAML files, or
    genes by name."""
    racing: Racing | None = Racing()
    """Stop asking a candidate once it cannot be the best; `false` asks everything of everyone. Only where every task's
    metric is a mean over its questions; else everything is asked."""
    finalists: int = Field(default=4, ge=0)
    """So many of the best, and the best parent and the uniform merge, are asked further questions in the end, and the
    best by all they were asked is handed over: a score that was picked as the highest of many flatters. The questions
    are those of `split: {selection: …}`, or what `limit` has left of the search tasks, up to as many again. 0: none."""
    objective: Literal["sum", "pareto"] = "sum"
    """`sum`: the weighted sum of the tasks' metrics. `pareto`: every task is an aim of its own, and the run ends with
    those candidates than which none is better at one task without being worse at another. Of a weight only the sign
    counts then; the weighted sum says which of the front is handed over by default."""
    sigma_rule: Literal["csa", "success", "legacy", "llm"] = "csa"
    """How the `llm` optimizers adapt their step size: by the length of the path (CMA-ES), by the share of successes,
    as LLM-Evo-Merge does, or by what the LLM says of each slice."""

    @field_validator("racing", mode="before")
    @classmethod
    def _raced(cls, value: Any) -> Any:
        return _switched("racing", value)

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer {self.optimizer!r} is unknown{nearest(self.optimizer, OPTIMIZERS)}")
        return self


class Llm(_Section):
    """The LLM that proposes."""

    proposer: str = "auto"
    """`openai` (any OpenAI-compatible server), `local` (a model on this machine), `recorded` (an earlier run's
    replies), or `auto`: openai when a key, a base_url or a model is given, else local with the base model."""
    model: str | None = None
    """The server's name for it (default gpt-4o), or a model reference for `local` (default: the base model)."""
    base_url: str | None = None
    """Of a server of your own: vLLM, Ollama, llama.cpp, ..."""
    api_key_file: Path | None = None
    """A file that holds the key; OPENAI_API_KEY and --api-key are the other ways to give it."""
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


class Engine(_Section):
    """Where candidates are loaded and scored."""

    backend: Literal["auto", "hf", "vllm"] = "auto"
    """`hf`: transformers, in this process. `vllm`: a vLLM engine, merged into inside its workers. `auto`: vllm where
    there are a GPU and vLLM, else hf."""
    device: str | None = None
    """For `hf`: `cuda`, `cuda:1`, `cpu`; the first GPU by default."""
    options: dict[str, Any] = Field(default_factory=dict[str, Any])
    """For `vllm`: keywords of `vllm.LLM`, such as tensor_parallel_size, gpu_memory_utilization, max_model_len."""
    self_check: bool = True
    """Before the first candidate, compare one that is merged into the engine with the same one exported. Needs room
    for one model in the temporary folder."""
    cache_gb: float = Field(default=0.5, ge=0)
    """Memory, in 10⁹ bytes, for what no gene changes: norms, angles, magnitudes, ranks, products of adapters."""


class Config(_Section):
    """A whole config file. The files of mergekit-evolve and LLM-Evo-Merge are configs as they are."""

    genome: Genome
    tasks: list[Task] = Field(min_length=1)
    """What candidates are scored on while searching."""
    heldout: list[Task] = Field(default_factory=list[Task])
    """What the result is scored on in the end, and nothing before; shares no question with `tasks`."""
    constraints: list[str] = Field(default_factory=list[str])
    """What a merge must keep, of the counted metrics of `tasks`: `["arc >= parent - 0.01", "gsm8k >= 0.4"]`. `parent`
    is the best parent's score on that task and `uniform` the uniform merge's, as this run measures them on the same
    questions. A candidate that violates one ranks below all that keep them."""
    allow_benchmark_tasks: bool = False
    """Search on the scored split of a public benchmark all the same. It is refused otherwise: see
    `llmevo.tasks.benchmarks`; held-out tasks may be any."""
    gate: Gate | None = None
    """Ask every candidate for a few short replies first: one whose replies are empty, loop, or are in another script
    than the prompts and the parents' replies fails without being asked its tasks. `true`, or a mapping such as
    `{prompts: prompts.txt, tokens: 48}`."""
    split: Split | None = None
    """Cut the questions of `tasks` into disjoint sets, such as `{search: 0.5, selection: 0.2, heldout: 0.3}`; then
    `heldout:` needs no tasks of its own."""
    limit: int | None = Field(default=None, ge=1)
    """Questions a search task at most."""
    num_fewshot: int | None = Field(default=None, ge=0)
    shuffle: bool = False
    random_init: bool = False
    """Start from a random point instead of the uniform merge."""
    apply_chat_template: bool = True
    fewshot_as_multiturn: bool = True
    task_search_path: list[Path] = Field(default_factory=list[Path])
    """Folders with lm-eval task files of your own."""
    search: Search = Search()
    llm: Llm = Llm()
    engine: Engine = Engine()
    loggers: list[dict[str, Any]] = Field(default_factory=list[dict[str, Any]])
    """Where `llmevo run` and `resume` send scores, genes and thoughts beside the log: `wandb`, `tensorboard`, `mlflow`;
    names, or mappings with options: `{name: wandb, project: merges}`. See `llmevo.loggers`."""

    @field_validator("loggers", mode="before")
    @classmethod
    def _known_loggers(cls, value: Any) -> Any:
        return read_loggers(value)

    @model_validator(mode="after")
    def _held_out_once(self) -> Self:
        if self.heldout and self.split and self.split.heldout:
            raise ValueError(
                f"split.heldout: {self.split.heldout:g} of the search tasks is held out, and so are the tasks of"
                " `heldout:`; keep one of the two"
            )
        return self

    @field_validator("gate", mode="before")
    @classmethod
    def _gated(cls, value: Any) -> Any:
        return _switched("gate", value)

    @field_validator("constraints")
    @classmethod
    def _readable(cls, value: list[str]) -> list[str]:
        return [Constraint.parse(text).text for text in value]

    @model_validator(mode="after")
    def _aimed(self) -> Self:
        names = [task.name for task in self.tasks]
        for constraint in self.aims.constraints:
            if constraint.task not in names:
                raise ValueError(
                    f"constraints: {constraint.text!r} names {constraint.task!r}, which is none of `tasks:`"
                    f"{nearest(constraint.task, names)}"
                )
        if self.aims.pareto:
            if len(names) < 2:
                raise ValueError("search.objective: pareto needs two tasks or more; there is one, so use `sum`")
            if idle := [task.name for task in self.tasks if not task.weight]:
                raise ValueError(
                    f"search.objective: with pareto the sign of a weight says which way is better, and {idle[0]} has"
                    " the weight 0; give it 1, or -1 where lower is better"
                )
        return self

    @model_validator(mode="after")
    def _priced(self) -> Self:
        prices = [self.llm.price, *(task.judge.price for task in self.tasks if task.judge)]
        if self.search.budget.cost is not None and not any(price.prompt or price.completion for price in prices):
            raise ValueError(
                f"search.budget: its cost ({self.search.budget.cost:g}) needs to know what the LLM costs; add its"
                " prices per million tokens, such as `llm: {price: {prompt: 2.5, completion: 10}}`"
            )
        return self

    @property
    def evaluation_seed(self) -> int:
        """What random masks, shuffled questions and solved examples follow from."""
        return self.search.seed if self.search.evaluation_seed is None else self.search.evaluation_seed

    @property
    def racing(self) -> Racing | None:
        """When to stop asking a candidate. With several aims never: one that is behind in the sum may still be the
        best at a task, and the front compares what all were asked.
        """
        return None if self.search.objective == "pareto" else self.search.racing

    @property
    def aims(self) -> Aims:
        """The objective and the constraints."""
        constraints = tuple(map(Constraint.parse, self.constraints))
        return Aims(self.counted, constraints, self.search.objective, self.search.seed)

    @property
    def protocol(self) -> Protocol:
        """How search tasks are asked."""
        looks = self.racing.looks if self.racing else 1
        share = (0.0, self.split.search) if self.split else None
        return replace(self._asked, limit=self.limit, share=share, blocks=looks)

    @property
    def selection_protocol(self) -> Protocol | None:
        """How search tasks are asked what candidates were not; None where nothing is left for it."""
        if not self.search.finalists:
            return None
        if self.split:
            low, high = self.split.search, self.split.search + self.split.selection
            return replace(self._asked, share=(low, high)) if high > low else None
        return replace(self._asked, after=self.limit, limit=self.limit) if self.limit else None

    @property
    def heldout_protocol(self) -> Protocol:
        """How held-out tasks are asked: all their questions."""
        if self.split and self.split.heldout:
            low = self.split.search + self.split.selection
            return replace(self._asked, share=(low, low + self.split.heldout), shuffle=False)
        return replace(self._asked, shuffle=False)

    @property
    def heldout_tasks(self) -> list[Task]:
        """The held-out tasks: those listed, or the search tasks on their own questions."""
        return self.tasks if self.split and self.split.heldout else self.heldout

    @property
    def _asked(self) -> Protocol:
        return Protocol(
            num_fewshot=self.num_fewshot,
            shuffle=self.shuffle,
            seed=self.evaluation_seed,
            apply_chat_template=self.apply_chat_template,
            fewshot_as_multiturn=self.fewshot_as_multiturn,
        )

    @property
    def counted(self) -> dict[str, tuple[float, str]]:
        """Each task's weight and the metric that counts."""
        return {task.name: (task.weight, task.metric) for task in self.tasks}


def read_config(file: Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """The config in a file, with `{"search.budget": 10}`-like overrides.

    Raises ConfigError that names the key, the value and the way out.
    """
    try:
        raw: Any = yaml.safe_load(file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{file}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not YAML: {error}") from error
    return parse_config(raw, str(file), overrides)


def parse_config(raw: Any, origin: str, overrides: Mapping[str, Any] | None = None) -> Config:
    """The config in plain values; see `read_config`."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{origin}: a config is a mapping with `genome:` and `tasks:`, this is {type(raw).__name__}")
    values: dict[str, Any] = dict(raw)
    for path, value in (overrides or {}).items():
        section, _, key = path.partition(".")
        given = values.get(section) or {}
        if isinstance(given, dict):  # the validation below says so if it is anything else
            values[section] = {**given, key: value}
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{origin}: {_explain(detail)}" for detail in error.errors()[:5])) from None


def _explain(detail: Any) -> str:
    """One validation error, with the key's path and the nearest known key."""
    place = ".".join(str(part) for part in detail["loc"])
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        model: type[BaseModel] | None = Config
        for part in detail["loc"][:-1]:
            model = _section(model, str(part)) if model else None
        known = [*model.model_fields] if model else []
        return f"{place}: there is no such key{nearest(str(detail['loc'][-1]), known)}"
    if detail["type"] == "missing":
        return f"{place}: this key is missing"
    if not place:
        return message  # of several sections together; it names them
    return f"{place}: {message}" + ("" if isinstance(detail["input"], dict) else f" (it is {detail['input']!r})")


def _section(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The model behind a key, through lists."""
    if key.isdigit():
        return model
    field = model.model_fields.get(key)
    kinds: list[Any] = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
