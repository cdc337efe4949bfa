"""The config of a run: its sections together, and what follows from several of them; read from a file."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from llmevo.errors import ConfigError, RunError, UserError, nearest, shortened
from llmevo.evaluation.tasks.task import AskingOptions, Task
from llmevo.llm import CLIENTS
from llmevo.llm.client import Price
from llmevo.models.yaml import read_yaml
from llmevo.search.genome import Genome
from llmevo.search.objectives.objective import Constraint, Objective
from llmevo.search.optimizers import OPTIMIZERS

TRACKERS: Mapping[str, tuple[str, ...]] = {
    "wandb": ("project", "entity", "group", "tags", "mode"),
    "tensorboard": ("folder",),
    "mlflow": ("tracking_uri", "experiment"),
}
"""Every experiment tracker by its name, with the options that a config may give it."""


def read_loggers(entries: Any) -> list[dict[str, Any]]:
    """The loggers in a config: names, or mappings of a `name` and options. Raises ValueError for what is unknown."""
    read: list[dict[str, Any]] = []
    for entry in entries if isinstance(entries, list) else [entries]:
        given: dict[str, Any] = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(given, dict) or "name" not in given:
            raise ValueError(
                f"give a list of names, or of mappings with a name and options; known: {', '.join(TRACKERS)}"
            )
        name, options = given["name"], TRACKERS.get(given["name"])
        if options is None:
            raise ValueError(f"logger {name!r} is unknown{nearest(str(name), TRACKERS)}")
        for option in given.keys() - {"name"}:
            if option not in options:
                raise ValueError(f"{name} has no option {option!r}{nearest(option, options)}")
        if name in (other["name"] for other in read):
            raise ValueError(f"logger {name!r} is listed twice")
        read.append(given)
    return read


STEP = "leave it out: the optimizers set their step size themselves (`search.sigma_rule` says how `llm` does)"


GPUS = "`engine.options` of the config, such as `engine: {backend: vllm, options: {tensor_parallel_size: 2}}`"


BITS = "leave it out: candidates are scored in the type of `genome.dtype`, as they are exported"


MEMORY = "leave it out: candidates are always merged in memory"


BATCH = "leave it out: the engine sets its batches by the memory that is free"


JOBS = "leave it out: one engine merges and scores all candidates, and nothing is scheduled"


NAMES = {
    "max-fevals": ("--budget", "search.budget"),
    "max-generation": ("--budget, in candidates", "search.budget, in candidates"),
    "max-generations": ("--budget, in candidates", "search.budget, in candidates"),
    "popsize": ("`search.population` of the config", "search.population"),
    "population-size": ("`search.population` of the config", "search.population"),
    "force-population-size": ("`search.population` of the config", "search.population"),
    "sigma0": (STEP, STEP),
    "sigma-low": (STEP, STEP),
    "sigma-high": (STEP, STEP),
    "random-seed": ("--seed", "search.seed"),
    "storage-path": ("--out", "the option --out of `llmevo run`"),
    "vllm": ("--backend vllm", "`engine: {backend: vllm}`"),
    "no-vllm": ("--backend hf", "`engine: {backend: hf}`"),
    "strategy": (JOBS, JOBS),
    "num-gpus": (GPUS, GPUS),
    "in-memory": (MEMORY, MEMORY),
    "no-in-memory": (MEMORY, MEMORY),
    "merge-cuda": ("`engine.device` of the config", "engine.device"),
    "no-merge-cuda": ("`engine: {device: cpu}` in the config", "`engine: {device: cpu}`"),
    "batch-size": (BATCH, BATCH),
    "load-in-8bit": (BITS, BITS),
    "load-in-4bit": (BITS, BITS),
    "timeout": ('--budget "30 min"', "search.budget, such as `30 min`"),
    "trust-remote-code": ("leave it out: code beside a model is not run",) * 2,
    "wandb": ("--logger wandb", "`loggers: [wandb]`"),
    "no-wandb": ("leave it out: wandb is told only with --logger wandb",) * 2,
    "wandb-project": (
        "`loggers: [{name: wandb, project: NAME}]` in the config",
        "`loggers: [{name: wandb, project: …}]`",
    ),
    "wandb-entity": ("`loggers: [{name: wandb, entity: NAME}]` in the config", "`loggers: [{name: wandb, entity: …}]`"),
    "i-understand-the-depths-of-the-evils-i-am-unleashing": (
        "`allow_benchmark_tasks: true` in the config",
        "allow_benchmark_tasks",
    ),
    "save-final-model": ("`llmevo export RUN OUT` after the run",) * 2,
    "no-save-final-model": ("leave it out: `llmevo export` writes the model",) * 2,
    "reshard": (MEMORY, MEMORY),
    "no-reshard": (MEMORY, MEMORY),
    "allow-crimes": ("leave it out: the models of a merge need one architecture",) * 2,
    "no-allow-crimes": ("leave it out",) * 2,
    "llm-model": ("--model", "llm.model"),
    "max-retries": ("`llm.retries` of the config", "llm.retries"),
}
"""{its name there: (what to write on the command line, what to write in the config)}."""


REMOVED = {
    "engine.adapters": "every candidate is merged before it is scored, so leave it out",
    "search.racing.proxy": "racing compares the metrics of the tasks, so leave it out",
}
"""{key of an earlier version: what to do instead}. Logs that have such a key are read without it."""


REMOVED_VALUES = {
    "search.optimizer": {"one-plus-one": "use cma-es"},
    "search.sigma_rule": {
        "success": "use csa",
        "legacy": "use csa, or the optimizer llm-evo-merge, which has these two step sizes",
    },
}
"""{key: {value of an earlier version: what to use instead}}. Logs that have such a value can be read, not continued."""


LOGGED = "logged"
"""The validation context of a config that a log holds."""


SIGMA_RULES = ("csa", "llm")


def check_values(values: Mapping[str, Any], origin: str) -> None:
    """Raise RunError where the config of a log has a removed value: its candidates cannot be computed again."""
    for place, ways in REMOVED_VALUES.items():
        section, _, key = place.partition(".")
        value = (values.get(section) or {}).get(key)
        if value in ways:
            raise RunError(
                f"{origin}: {place}: {value!r} was removed, so this run can be shown and exported, but neither resumed"
                " nor verified; to search further, begin a new run with its best.yml in search.start_from"
            )


def without_removed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a log of an earlier version without the keys that were removed since."""
    return _without(values, [*REMOVED])


def _without(values: Mapping[str, Any], places: Sequence[str]) -> dict[str, Any]:
    kept = {key: value for key, value in values.items() if key not in places}
    for place in places:
        head, _, rest = place.partition(".")
        if rest and isinstance(section := kept.get(head), dict):
            kept[head] = _without(section, [rest])
    return kept


def check_options(words: Sequence[str]) -> None:
    """Raise UserError for an option of the other tools on the command line, with what to write instead."""
    for word in words:
        name = word.partition("=")[0]
        if name.startswith("--") and (ways := NAMES.get(name.removeprefix("--").replace("_", "-"))):
            raise UserError(f"{name}: there is no such option here; {_advice(ways[0])}")


def key_hint(key: str) -> str:
    """What to write instead of a key that is an option of the other tools; empty for any other."""
    ways = NAMES.get(key.replace("_", "-"))
    return f"; {_advice(ways[1])}" if ways else ""


def _advice(way: str) -> str:
    return way if way.startswith("leave") else f"use {way}"


def explained(detail: Any, root: type[BaseModel]) -> str:
    """One of pydantic's errors about a `root`: the path of the key, what is wrong, and the nearest known key."""
    place = ".".join(str(part) for part in detail["loc"])
    message = detail["msg"].removeprefix("Value error, ")
    if place in REMOVED:
        return f"{place}: this key was removed; {REMOVED[place]}"
    if isinstance(detail["input"], str) and detail["input"] in REMOVED_VALUES.get(place, ()):
        return f"{place}: {detail['input']!r} was removed; {REMOVED_VALUES[place][detail['input']]}"
    if detail["type"] == "extra_forbidden":
        model: type[BaseModel] | None = root
        for part in detail["loc"][:-1]:
            model = _section(model, str(part)) if model else None
        known = [*model.model_fields] if model else []
        key = str(detail["loc"][-1])
        return f"{place}: there is no such key{key_hint(key) or _elsewhere(key, place, root) or nearest(key, known)}"
    if detail["type"] == "missing":
        return f"{place}: this key is missing"
    if not place:
        return shortened(message)  # of several sections together; it names them
    given = "" if isinstance(detail["input"], dict) else f" (it is {shortened(repr(detail['input']), 200)})"
    return f"{place}: {shortened(message)}{given}"


def _elsewhere(key: str, place: str, root: type[BaseModel]) -> str:
    """Where a key belongs that stands in a wrong section: at the top, or in a section of the config."""
    if key in root.model_fields and "." in place:
        return f"; {key!r} belongs at the top of the file, not under {place.rpartition('.')[0]!r}"
    sections = {name: _section(root, name) for name in root.model_fields}
    homes = [name for name, section in sections.items() if section and key in section.model_fields]
    return f"; use {homes[0]}.{key}" if len(homes) == 1 and not place.startswith(f"{homes[0]}.") else ""


def _section(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The model behind a key, through lists."""
    if key.isdigit():
        return model
    field = model.model_fields.get(key)
    kinds: list[Any] = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


MANY = 1000
"""Evaluations at most where only another kind is bounded: what optimizers plan with then."""


UNITS = {
    "evaluations": ("", "evaluation", "evaluations", "evals"),
    "items": ("item", "items", "question", "questions"),
    "minutes": ("m", "min", "minute", "minutes"),
    "hours": ("h", "hour", "hours"),
    "cost": ("$", "cost"),
}


AMOUNT = re.compile(r"(\$?)\s*(\d[\d_,]*\.?\d*|\.\d+)\s*([a-z]*)")


FORMS = "give a number of evaluations, or amounts with units such as `100, 50000 items, 60 min, 1.5 h, $5`"


class Budget(BaseModel):
    """The bounds of a search. In a config a number (of evaluations), a mapping, or amounts with units as text."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    evaluations: int = Field(default=MANY, ge=1)
    """Candidates to score, the start rows included; 1000 where only other kinds are given."""
    items: int | None = Field(default=None, ge=1)
    """Questions to answer while searching."""
    minutes: float | None = Field(default=None, gt=0)
    """Of merging, scoring and asking the LLM, as the log has them; pauses and loading do not count."""
    cost: float | None = Field(default=None, gt=0)
    """Of the LLM, in the units of `llm.price`, and of judges, in those of `judge.price`."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: object) -> object:
        if isinstance(value, bool) or value is None or value == {}:
            raise ValueError(FORMS)
        if isinstance(value, int | float):
            return {"evaluations": value}
        return _amounts(value) if isinstance(value, str) else value

    @model_serializer
    def _written(self) -> int | dict[str, float]:
        others = {kind: value for kind in ("items", "minutes", "cost") if (value := getattr(self, kind)) is not None}
        return {"evaluations": self.evaluations, **others} if others else self.evaluations

    @property
    def bounds(self) -> dict[str, float]:
        """The kinds that are bounded, without the evaluations that nobody has bounded."""
        written: Any = self._written()
        given: dict[str, float] = written if isinstance(written, dict) else {"evaluations": written}
        return {
            kind: value for kind, value in given.items() if len(given) == 1 or (kind, value) != ("evaluations", MANY)
        }

    def evaluations_of(self, items: int) -> int:
        """Evaluations to plan with before anything is scored, when each answers so many questions."""
        return self.evaluations if self.items is None else min(self.evaluations, self.items // max(1, items))

    def __str__(self) -> str:
        return ", ".join(amount_in_words(kind, bound) for kind, bound in self.bounds.items())


def parse_budget(*texts: str) -> Budget:
    """The budget that `--budget` means: `100`, `50000 items`, `100, 1.5 h, $5`; of several, the last of each kind.

    Raises ConfigError that names the value and the way out.
    """
    bounds: dict[str, float] = {}
    for text in texts:
        try:
            bounds |= Budget.model_validate(text).bounds
        except ValueError as error:
            errors: Any = getattr(error, "errors", None)  # of pydantic's, the first one's own words
            reason = errors()[0]["msg"].removeprefix("Value error, ") if errors else str(error)
            named = "" if repr(text) in reason else f" (it is {text!r})"
            raise ConfigError(f"--budget: {reason}{named}") from None
    return Budget.model_validate(bounds)


def _amounts(text: str) -> dict[str, float]:
    """Amounts with units, separated by commas. Raises ValueError."""
    found: dict[str, float] = {}
    for part in re.split(r",(?!\d{3}(?!\d))", text.lower()):  # 50,000 is one number; 100, 500 are two
        match = AMOUNT.fullmatch(part.strip())
        unit = match and (match[1] or match[3])
        kind = next((kind for kind, units in UNITS.items() if unit in units), None)
        if match is None or kind is None or (match[1] and match[3]):
            raise ValueError(f"{part.strip()!r} is no amount; {FORMS}")
        value = float(match[2].replace(",", ""))
        kind, value = ("minutes", value * 60) if kind == "hours" else (kind, value)
        if kind in found:
            raise ValueError(f"{text!r} gives {kind} twice; {FORMS}")
        found[kind] = value
    return found


def amount_in_words(kind: str, bound: float, spent: float | None = None) -> str:
    """`12 of 100 evaluations`, or without what is spent `100 evaluations`."""
    whole = f"{bound:,.0f}" if bound == int(bound) else f"{bound:g}"
    of = "" if spent is None else f"{spent:,} of " if isinstance(spent, int) else f"{spent:.3g} of "
    named = "min" if kind == "minutes" else kind.removesuffix("s") if bound == 1 else kind
    return f"{of}{whole} {named}"


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
    """The share, at most, of the candidates that would get ahead of the best that are stopped. See `evaluation.racing`.

    The default rests on 40 simulated searches (`benchmarks/simulator.py race`), at equally many evaluations: it saves
    39 % of the questions, and the score changes by -0.001 ± 0.003. 0.2 saves 49 %, and stops the candidate with the
    highest score in 7 of the searches.
    """
    looks: int = Field(default=5, ge=2)
    """How often it is looked: parts the questions are asked in."""


class Gate(Section):
    """Short replies before the tasks; see `llmevo.evaluation.gate`."""

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
    sigma_rule: str = "csa"
    """How the `llm` optimizers adapt their step size: `csa`, by the length of the path (CMA-ES), or `llm`, the same and
    the widths of the samples around proposals by what the LLM says of each slice."""

    def population_of(self, genes: int) -> int:
        """Candidates a generation in a space of so many genes; the default is eq. 48 of
        https://arxiv.org/abs/1604.00772.
        """
        return self.population or 4 + int(3 * math.log(max(1, genes)))

    @field_validator("racing", mode="before")
    @classmethod
    def _raced(cls, value: Any) -> Any:
        return switched("racing", value)

    @field_validator("optimizer", "sigma_rule")
    @classmethod
    def _known(cls, value: str, info: ValidationInfo) -> str:
        known = OPTIMIZERS if info.field_name == "optimizer" else SIGMA_RULES
        removed = REMOVED_VALUES[f"search.{info.field_name}"] if info.context == LOGGED else ()
        if value not in known and value not in removed:
            raise ValueError(f"{info.field_name} {value!r} is unknown{nearest(value, known)}")
        return value


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
        if self.proposer not in ("auto", *CLIENTS, "simulated"):
            known = nearest(self.proposer, ["auto", *CLIENTS, "simulated"])
            raise ValueError(f"proposer {self.proposer!r} is unknown{known}")
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
    device: str | None = None
    """For `hf`: `cuda`, `cuda:1`, `cpu`; the first GPU by default."""
    options: dict[str, Any] = Field(default_factory=dict[str, Any])
    """For `vllm`: keywords of `vllm.LLM`, such as tensor_parallel_size, gpu_memory_utilization, max_model_len."""
    self_check: bool = True
    """Before the first candidate, compare one that is merged into the engine with the same one exported. Needs room
    for one model in the temporary folder."""
    cache_gb: float = Field(default=0.5, ge=0)
    """Memory, in 10⁹ bytes, for what no gene changes: norms, angles, magnitudes, ranks, products of adapters."""


class Config(Section):
    """A whole config file. The files of mergekit-evolve and LLM-Evo-Merge are configs as they are.

    >>> import llmevo
    >>> genome = {"models": ["one", "two"], "merge_method": "linear"}
    >>> config = llmevo.Config.model_validate({"genome": genome, "tasks": [{"name": "letters", "weight": 1.0}]})
    >>> config.search.optimizer, config.search.budget.evaluations
    ('llm', 100)
    """

    genome: Genome
    tasks: list[Task] = Field(min_length=1)
    """What candidates are scored on while searching."""
    heldout: list[Task] = Field(default_factory=list[Task])
    """What the result is scored on in the end, and nothing before; shares no question with `tasks`."""
    constraints: list[str] = Field(default_factory=list[str])
    """What a merge must keep, of the counted metrics of `tasks`: `["arc >= parent - 0.01", "gsm8k >= 0.4"]`, or one
    such text. `parent` is the best parent's score on that task and `uniform` the uniform merge's, as this run measures
    them on the same questions. A candidate that violates one ranks below all that keep them."""
    allow_benchmark_tasks: bool = False
    """Search on the scored split of a public benchmark all the same. It is refused otherwise: see
    `llmevo.evaluation.tasks.files`; held-out tasks may be any."""
    gate: Gate | None = None
    """Ask every candidate for a few short replies first: one whose replies are empty, loop, or are in another language
    or script than the prompts and the parents' replies fails without being asked its tasks. `true`, or a mapping such
    as `{prompts: prompts.txt, tokens: 48}`."""
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
    names, or mappings with options: `{name: wandb, project: merges}`. See `llmevo.run.trackers`."""

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
        return switched("gate", value)

    @field_validator("constraints", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

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
    def aims(self) -> Objective:
        """The objective and the constraints."""
        constraints = tuple(map(Constraint.parse, self.constraints))
        return Objective(self.counted, constraints, self.search.objective, self.search.seed)

    @property
    def protocol(self) -> AskingOptions:
        """How search tasks are asked."""
        looks = self.racing.looks if self.racing else 1
        share = (0.0, self.split.search) if self.split else None
        return replace(self._asked, limit=self.limit, share=share, blocks=looks)

    @property
    def selection_protocol(self) -> AskingOptions | None:
        """How search tasks are asked what candidates were not; None where nothing is left for it."""
        if not self.search.finalists:
            return None
        if self.split:
            low, high = self.split.search, self.split.search + self.split.selection
            return replace(self._asked, share=(low, high)) if high > low else None
        return replace(self._asked, after=self.limit, limit=self.limit) if self.limit else None

    @property
    def heldout_protocol(self) -> AskingOptions:
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
    def _asked(self) -> AskingOptions:
        return AskingOptions(
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
        raw = read_yaml(file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{file}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read ({error})") from error
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from error
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
    return _validated(values, origin)


def parse_logged(raw: Mapping[str, Any], origin: str) -> Config:
    """Return the config in a log of this version or of an earlier one, whose removed keys and values are accepted."""
    return _validated(without_removed(raw), origin, LOGGED)


def _validated(values: Mapping[str, Any], origin: str, context: str | None = None) -> Config:
    try:
        return Config.model_validate(values, context=context)
    except ValidationError as error:
        raise ConfigError(
            "\n".join(f"{origin}: {explained(detail, Config)}" for detail in error.errors()[:5])
        ) from None
