"""The config of a run: its sections, keys and defaults, and the messages for mistakes in it."""

import math
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
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
from llmevo.search.objectives.objective import SIZES, Constraint, Objective
from llmevo.search.paths.registry import PATHS, every

TRACKERS: Mapping[str, tuple[str, ...]] = {
    "wandb": ("project", "entity", "group", "tags", "mode"),
    "tensorboard": ("folder",),
    "mlflow": ("tracking_uri", "experiment"),
}
"""The options of each experiment tracker, by its name."""


def read_loggers(entries: Any) -> list[dict[str, Any]]:
    """The loggers of a config: names, or mappings of a `name` and options. Raises ValueError for unknown ones."""
    read: dict[str, dict[str, Any]] = {}
    for entry in entries if isinstance(entries, list) else [entries]:
        given: Any = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(given, dict) or "name" not in given:
            raise ValueError(
                f"give a list of names, or of mappings with a name and options; known: {', '.join(TRACKERS)}"
            )
        name: Any = given["name"]
        if name not in TRACKERS:
            raise ValueError(f"logger {name!r} is unknown{nearest(str(name), TRACKERS)}")
        for option in given.keys() - {"name", *TRACKERS[name]}:
            raise ValueError(f"{name} has no option {option!r}{nearest(option, TRACKERS[name])}")
        if name in read:
            raise ValueError(f"logger {name!r} is listed twice")
        read[name] = given
    return [*read.values()]


STEP = "leave it out: the optimizers set their step size themselves"
MEMORY = "leave it out: candidates are always merged in memory"

FOREIGN_OPTIONS: Mapping[str, str | tuple[str, str]] = {
    "max-fevals": ("--budget", "search.budget"),
    **dict.fromkeys(("max-generation", "max-generations"), ("--budget, in candidates", "search.budget, in candidates")),
    **dict.fromkeys(("popsize", "population-size", "force-population-size"), "`search.population` of the config"),
    **dict.fromkeys(("sigma0", "sigma-low", "sigma-high"), STEP),
    "random-seed": ("--seed", "search.seed"),
    "storage-path": "the option --out of `llmevo run`",
    "vllm": ("--backend vllm", "`engine: {backend: vllm}`"),
    "no-vllm": ("--backend hf", "`engine: {backend: hf}`"),
    "strategy": "leave it out: every worker merges and scores in memory; `engine.workers` says how many there are",
    "num-gpus": ("--workers", "engine.workers"),
    **dict.fromkeys(("in-memory", "no-in-memory", "reshard", "no-reshard"), MEMORY),
    "merge-cuda": "`engine.device` of the config",
    "no-merge-cuda": "`engine: {device: cpu}` in the config",
    "batch-size": "leave it out: the engine chooses its batches by the free memory",
    **dict.fromkeys(
        ("load-in-8bit", "load-in-4bit"),
        "leave it out: candidates are scored in the type of `genome.dtype`, as they are exported",
    ),
    "timeout": ('--budget "30 min"', "search.budget, such as `30 min`"),
    "trust-remote-code": "leave it out: llmevo does not run code of model repositories",
    "wandb": ("--logger wandb", "`loggers: [wandb]`"),
    "no-wandb": "leave it out: llmevo uses wandb only where `loggers` or --logger names it",
    "wandb-project": "`loggers: [{name: wandb, project: NAME}]` in the config",
    "wandb-entity": "`loggers: [{name: wandb, entity: NAME}]` in the config",
    "i-understand-the-depths-of-the-evils-i-am-unleashing": "`allow_benchmark_tasks: true` in the config",
    "save-final-model": "`llmevo export RUN OUT` after the run",
    "no-save-final-model": "leave it out: `llmevo export` writes the model",
    "allow-crimes": "leave it out: the models of a merge need one architecture",
    "no-allow-crimes": "leave it out",
    "llm-model": ("--model", "llm.model"),
    "max-retries": "`llm.retries` of the config",
}
"""Options of mergekit-evolve and LLM-Evo-Merge: what to write instead, on the command line and in the config."""

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
"""The validation context of a config in a log."""

SIGMA_RULES = ("csa", "llm")

WITH_PRIOR = ("llm", "llm-off")
"""The optimizers with `search.prior`."""


KINDS = {"model_type": "give a mapping", "dict_type": "give a mapping", "list_type": "give a list"}
"""{type of a pydantic error about a wrong kind of value: what to give}."""


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
    """The config of an earlier version's log, without the keys that were removed since."""
    kept = deepcopy(dict(values))
    for place in REMOVED:
        *sections, key = place.split(".")
        section: Any = kept
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section.pop(key, None)
    return kept


def check_options(words: Sequence[str]) -> None:
    """Raise UserError for an option of another tool on the command line, with what to write instead."""
    for word in words:
        name = word.partition("=")[0]
        if name.startswith("--") and (advice := _foreign_option(name.removeprefix("--"), in_config=False)):
            raise UserError(f"{name}: there is no such option here; {advice}")


def _foreign_option(name: str, in_config: bool) -> str:
    """The advice for an option of another tool; empty for any other name."""
    advice = FOREIGN_OPTIONS.get(name.replace("_", "-"), "")
    if not isinstance(advice, str):
        advice = advice[in_config]
    return f"use {advice}" if advice and not advice.startswith("leave") else advice


def explain(detail: Any, root: type[BaseModel]) -> str:
    """A message for one of pydantic's errors about a `root`: the key's path, the mistake, and the way out."""
    place = ".".join(str(part) for part in detail["loc"])
    message = detail["msg"].removeprefix("Value error, ")
    if place in REMOVED:
        return f"{place}: this key was removed; {REMOVED[place]}"
    if isinstance(detail["input"], str) and detail["input"] in REMOVED_VALUES.get(place, ()):
        return f"{place}: {detail['input']!r} was removed; {REMOVED_VALUES[place][detail['input']]}"
    if detail["type"] == "extra_forbidden":
        known = _keys_of(root, detail["loc"][:-1])
        key = str(detail["loc"][-1])
        foreign = _foreign_option(key, in_config=True)
        hint = f"; {foreign}" if foreign else _right_section(key, place, root) or nearest(key, known)
        return f"{place}: there is no such key{hint}"
    if detail["type"] == "missing":
        return f"{place}: this key is missing"
    if not place:
        return shortened(message)  # of several sections together: the message names them
    value = detail["input"]
    if detail["type"] in KINDS:
        keys = _keys_of(root, detail["loc"]) if detail["type"] == "model_type" else []
        message = KINDS[detail["type"]] + (f" with keys such as `{keys[0]}`" if keys else "")
    is_named = isinstance(value, dict) or (isinstance(value, str) and repr(value) in message)
    given = "" if is_named else f" (it is {shortened(repr(value), 200)})"
    return f"{place}: {shortened(message)}{given}"


def _right_section(key: str, place: str, root: type[BaseModel]) -> str:
    """A hint for a key in a wrong section: it belongs at the top, or in another section."""
    if key in root.model_fields and "." in place:
        return f"; {key!r} belongs at the top of the file, not under {place.rpartition('.')[0]!r}"
    sections = {name: _section(root, name) for name in root.model_fields}
    homes = [name for name, section in sections.items() if section and key in section.model_fields]
    return f"; use {homes[0]}.{key}" if len(homes) == 1 and not place.startswith(f"{homes[0]}.") else ""


def _keys_of(root: type[BaseModel], place: Sequence[str | int]) -> list[str]:
    """The keys of the section at a place; none where there is no section."""
    model: type[BaseModel] | None = root
    for part in place:
        model = _section(model, str(part)) if model else None
    return [*model.model_fields] if model else []


def _section(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The model behind a key, through lists."""
    if key.isdigit():
        return model
    field = model.model_fields.get(key)
    kinds: list[Any] = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


MANY = 1000
"""The bound of evaluations if the config bounds only other amounts: optimizers plan with it."""

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
    """The bounds of a search; in a config a number (of evaluations), a mapping, or a text of amounts with units."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    evaluations: int = Field(default=MANY, ge=1)
    """Candidates to score, start rows included; 1000 if only other bounds are given."""
    items: int | None = Field(default=None, ge=1)
    """Questions to answer in the search."""
    minutes: float | None = Field(default=None, gt=0)
    """Minutes of merging, scoring and LLM calls, as logged; pauses and loading do not count."""
    cost: float | None = Field(default=None, gt=0)
    """Cost of the LLM, in the units of `llm.price`, and of judges, in those of `judge.price`."""

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
        """The amounts that the config bounds."""
        written = self._written()
        if isinstance(written, int):
            return {"evaluations": written}
        return {kind: value for kind, value in written.items() if (kind, value) != ("evaluations", MANY)}

    def evaluations_of(self, items: int) -> int:
        """Evaluations to plan with before the search, if each answers `items` questions."""
        return self.evaluations if self.items is None else min(self.evaluations, self.items // max(1, items))

    def __str__(self) -> str:
        return ", ".join(amount_in_words(kind, bound) for kind, bound in self.bounds.items())


def parse_budget(*texts: str) -> Budget:
    """The budget of `--budget`: `100`, `50000 items`, `100, 1.5 h, $5`; of several, the last of each kind.

    Raises ConfigError.
    """
    bounds: dict[str, float] = {}
    for text in texts:
        try:
            bounds |= Budget.model_validate(text).bounds
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            named = "" if repr(text) in reason else f" (it is {text!r})"
            raise ConfigError(f"--budget: {reason}{named}") from None
    return Budget.model_validate(bounds)


def parse_workers(text: str | None) -> int | Literal["auto"] | None:
    """The number of `--workers`, or `auto`; None without the option. Raises ConfigError."""
    if text is None or text == "auto":
        return text
    if not (text.isascii() and text.isdigit() and int(text)):
        raise ConfigError(f"--workers: give a number of 1 or more, or auto (it is {text!r})")
    return int(text)


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
    """`12 of 100 evaluations`, or without `spent`, `100 evaluations`."""
    whole = f"{bound:,.0f}" if bound == int(bound) else f"{bound:g}"
    of = "" if spent is None else f"{spent:,} of " if isinstance(spent, int) else f"{spent:.3g} of "
    named = "min" if kind == "minutes" else kind.removesuffix("s") if bound == 1 else kind
    return f"{of}{whole} {named}"


class Section(BaseModel):
    """A part of the config. An unknown key is an error; values cannot change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


def _switched(value: Any) -> Any:
    if isinstance(value, str | int | float | list) and not isinstance(value, bool):
        raise ValueError("give true, false or a mapping with its keys")
    return {} if value is True else None if value is False else value


Switch = BeforeValidator(_switched)
"""For a section that `true` enables with its defaults, and `false` disables."""


class Racing(Section):
    """Early stopping of candidates that cannot become the best; see `evaluation.racing`."""

    error_rate: float = Field(default=0.05, gt=0, lt=0.5)
    """The largest share of wrongly stopped candidates among those that would have become the best. In 40 simulated
    searches (`benchmarks/results/racing-simulator.jsonl`) 0.05 saves 39 % of the questions and changes the score by
    -0.001 ± 0.003; 0.2 saves 49 %, and stops the candidate with the highest score in 7 of them."""
    looks: int = Field(default=5, ge=2)
    """Parts of the questions, after each of which a candidate may be stopped."""


class Gate(Section):
    """Short replies before the tasks; see `evaluation.gate`."""

    prompts: Path | None = None
    """A file with one prompt a line. Default: the first questions of search tasks with free-text replies, or if there
    are none, generic prompts."""
    tokens: int = Field(default=48, ge=16)
    """Maximum length of a reply."""
    share: float = Field(default=0.5, ge=0, lt=1)
    """A candidate fails if more of its replies are degenerate, and more than any parent's."""


class Split(Section):
    """The shares of each task's questions; a question's share follows from its text and the seed."""

    search: float = Field(gt=0, le=1)
    """The share for the search."""
    selection: float = Field(default=0.0, ge=0, lt=1)
    """The share on which finalists are compared."""
    heldout: float = Field(default=0.0, ge=0, lt=1)
    """The share for the held-out score at the end."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.search + self.selection + self.heldout > 1 + 1e-9:
            shares = f"{self.search:g} + {self.selection:g} + {self.heldout:g}"
            raise ValueError(f"its shares add up to more than 1 ({shares})")
        return self


class Search(Section):
    """The search: optimizer, budget, seeds and the choice of the result."""

    optimizer: str = "llm"
    """The optimizer; `llmevo run --help` lists them."""
    budget: Budget = Budget(evaluations=100)
    """Candidates to score, start rows included; or several bounds, the first of which ends the search:
    `{evaluations: 100, items: 50000, minutes: 60, cost: 5}`."""
    population: int | None = Field(default=None, ge=2)
    """Candidates a generation, and of those that `cma-es`, `mergekit-evolve`, `sep-cma-es` and `nsga2` learn from at
    once; default 4 + ⌊3 ln genes⌋, the rule of CMA-ES. `llm` and `llm-off` take fewer at once, as they learn from
    each."""
    seed: int = Field(default=0, ge=0)
    """Seed of the candidates, and the default of `evaluation_seed`."""
    evaluation_seed: int | None = Field(default=None, ge=0)
    """Seed of random masks, shuffled questions, few-shot examples and the sets of `split`; default `seed`. `llmevo
    compare` gives all its runs the same one, so they are scored alike, and runs that start from one another need it."""
    order: Literal["auto", "strict", "steady"] = "auto"
    """With several workers. `strict`: the candidates of a generation are scored at the same time, and the next one is
    asked for when all are scored; the candidates do not depend on the number of workers that are alive. `steady`: a
    candidate is asked for whenever a worker is free. `auto`: `steady` for three workers and more where the optimizer
    allows it and asks no LLM, else `strict`."""
    start_from: list[Path | dict[str, float | str]] = Field(default_factory=list[Path | dict[str, float | str]])
    """Own recipes, scored after the parents and the uniform merges: mergekit's YAML files, genes by name, or layer
    paths (`{path: A 0-12 | A 8-30}`); or `model_stock`, the weights that Model Stock gives each slice. With two experts
    or more of a mixture (`MODEL#expert=0`) their average by the measured use of the routers comes first."""
    prior: Literal["model_stock"] | None = None
    """Where the optimizers `llm` and `llm-off` presume the best weights before anything is scored. `model_stock`: at
    those of Model Stock, as in `start_from`. How much that counts is learnt from the scores; an LLM's beliefs about a
    gene take its place."""
    racing: Annotated[Racing | None, Switch] = Racing()
    """Stop a candidate early if it cannot become the best; `false` scores all questions. Has no effect unless every
    task's metric is a mean over its questions."""
    finalists: int = Field(default=4, ge=0)
    """Best candidates to score on further questions at the end, with the best parent, the uniform merge and the best
    other weight for all models; the best by all questions is the result. The questions are those of
    `split: {selection: …}`, or the search tasks' questions beyond `limit`, up to as many again. 0: none."""
    objective: Literal["sum", "pareto"] = "sum"
    """`sum`: the weighted sum of the tasks' metrics. `pareto`: every task is an objective, by the sign of its weight;
    the run ends with the Pareto front, and the weighted sum selects its result."""
    sizes: list[Literal["layers", "parameters", "time"]] = Field(
        default_factory=list[Literal["layers", "parameters", "time"]]
    )
    """With `objective: pareto`: further objectives, less is better. They differ among layer paths only. `time` is the
    time for a token as a share of the first model's, computed, not measured: from the parameters that a token is
    multiplied by, in layers, experts in use and output head."""
    spaces: Literal["auto", "both"] = "auto"
    """`auto`: that of the optimizer, weights or layer paths. `both`: weights by the optimizer first, then paths over
    the best merge and the models, then the gains and weights of the best path together."""
    shares: tuple[float, float, float] = (0.5, 0.3, 0.2)
    """With `spaces: both`: the shares of the evaluations for weights with the start rows, for paths, and for both
    together."""
    sigma_rule: str = "csa"
    """The step size of `llm` in logs with `rules` below 3; of no use in a config."""

    def population_of(self, genes: int) -> int:
        """Candidates a generation for this many genes; default: eq. 48 of https://arxiv.org/abs/1604.00772."""
        return self.population or 4 + int(3 * math.log(max(1, genes)))

    @field_validator("start_from", mode="before")
    @classmethod
    def _rows(cls, value: object) -> object:
        for row in value if isinstance(value, list) else ():
            genes = [*dict[Any, Any](row).values()] if isinstance(row, Mapping) else []
            if not isinstance(row, str | Path | Mapping) or not all(isinstance(of, int | float | str) for of in genes):
                raise ValueError(
                    f"{shortened(repr(row), 80)} is no recipe; give a file, a mapping of genes, or model_stock"
                )
        return value

    @field_validator("optimizer", "sigma_rule")
    @classmethod
    def _known(cls, value: str, info: ValidationInfo) -> str:
        known = every() if info.field_name == "optimizer" else SIGMA_RULES
        removed = REMOVED_VALUES[f"search.{info.field_name}"] if info.context == LOGGED else ()
        if info.field_name == "sigma_rule" and value != "csa" and info.context != LOGGED:
            raise ValueError(f"this key has no effect any more; {STEP}")
        if value not in known and value not in removed:
            raise ValueError(f"{info.field_name} {value!r} is unknown{nearest(value, known)}")
        return value

    @model_validator(mode="after")
    def _spaces_fit(self) -> Self:
        if min(self.shares) <= 0 or abs(sum(self.shares) - 1) > 1e-9:
            shares = ", ".join(f"{share:g}" for share in self.shares)
            raise ValueError(
                f"shares: give three numbers over 0 with the sum 1, such as [0.5, 0.3, 0.2], not [{shares}]"
            )
        if self.prior and self.optimizer not in WITH_PRIOR:
            raise ValueError(
                f"prior: {self.optimizer} has no prior; give an optimizer that has one,"
                f" {' or '.join(WITH_PRIOR)}, or take the weights as a start row: start_from: [{self.prior}]"
            )
        if self.spaces == "both" and self.optimizer in PATHS:
            raise ValueError(
                f"spaces: both searches weights first, and {self.optimizer!r} searches layer paths alone; give an"
                " optimizer of weights, such as llm-off"
            )
        if self.order == "steady" and (self.spaces == "both" or self.optimizer in PATHS):
            raise ValueError("order: layer paths are asked for in generations; give strict")
        return self


class Llm(Section):
    """The LLM that proposes recipes."""

    proposer: str = "auto"
    """`openai` (any OpenAI-compatible server), `local` (a model on this machine), `recorded` (the replies of an earlier
    run), or `auto`: openai if a key, a base_url or a model is given. Else `llm` and `paths` run without an LLM, and
    `llm-evo-merge` asks the base model on this machine."""
    model: str | None = None
    """The server's name of the model (default gpt-4o), or a model reference for `local` (default: the base model)."""
    base_url: str | None = None
    """Address of an OpenAI-compatible server: vLLM, Ollama, llama.cpp, ..."""
    api_key_file: Path | None = None
    """A file that contains the key."""
    api_key_env: str | None = None
    """The environment variable that contains the key. Without this, `api_key_file` and `--api-key`, OPENAI_API_KEY is
    sent to OpenAI's server, or to that of OPENAI_BASE_URL, and to no other."""
    temperature: float | None = Field(default=None, ge=0)
    """Default: the server's own; for `local`, 0.8."""
    max_tokens: int = Field(default=4096, ge=16)
    """Maximum length of an answer, reasoning included."""
    timeout: float = Field(default=120.0, gt=0)
    """Time limit of a request in seconds."""
    retries: int = Field(default=4, ge=0)
    """Further attempts after a temporary failure."""
    prompts: Path | None = None
    """A folder with templates that replace llmevo's of the same name."""
    form: Literal["auto", "full", "short"] = "auto"
    """The prompt: `full`, up to 8,000 tokens, with all that is known; `short`, up to 1,500, with a simpler answer, for
    models of few billion parameters. `auto` is short for `local`, else full."""
    mask_names: bool = False
    """Hide the names of models, tasks and parameters from the LLM, to measure how much the search gains from them."""
    max_calls: int | None = Field(default=None, ge=0)
    """Maximum number of answers, repairs included, retries not; then the search continues without the LLM."""
    max_cost: float | None = Field(default=None, gt=0)
    """Maximum cost, in the units of `price`. No call is made that would exceed it at the cost of the
    most expensive one so far."""
    strict: bool = False
    """Stop, resumably, when the LLM is lost, instead of continuing without it."""
    transcript: Path | None = None
    """For `recorded`: the folder or events.jsonl of an earlier run."""
    price: Price = Price()
    """What the server charges, for budgets and reports: `{prompt: 2.5, completion: 10}` per million tokens."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        known = ["auto", *CLIENTS, "simulated"]
        if self.proposer not in known:
            raise ValueError(f"proposer {self.proposer!r} is unknown{nearest(self.proposer, known)}")
        if self.max_cost is not None and not (self.price.prompt or self.price.completion):
            raise ValueError(
                "max_cost needs prices per million tokens; add them, such as `price: {prompt: 2.5, completion: 10}`"
            )
        return self


class Elastic(Section):
    """A number of workers that changes as machines come and go."""

    min: int = Field(default=1, ge=1)
    """With fewer, the run does not begin."""
    max: int = Field(ge=1)
    """As many are started, as far as there is room for them. Not below `min`."""


Format = Literal["q8_0", "q4_0", "fp8"]
FORMATS: tuple[str, ...] = get_args(Format)
"""The formats of `models.quantize`, which takes seconds to import."""


class Engine(Section):
    """The engine that loads and scores candidates."""

    backend: Literal["auto", "hf", "vllm"] = "auto"
    """`hf`: transformers, in this process. `vllm`: a vLLM engine whose workers merge. `auto`: vllm if a GPU and vLLM
    are available, else hf."""
    device: str | None = None
    """For `hf`, which `auto` then is: `cuda`, `cuda:1`, `cpu`; default: the first GPU."""
    options: dict[str, Any] = Field(default_factory=dict[str, Any])
    """For `vllm`: keywords of `vllm.LLM`, such as tensor_parallel_size, gpu_memory_utilization, max_model_len."""
    self_check: bool = True
    """Compare one merge in the engine with the same merge exported before the search. Needs room for one model in the
    temporary folder."""
    cache_gb: float = Field(default=0.5, ge=0)
    """Memory, in 10⁹ bytes, for values that no gene changes: norms, angles, magnitudes, ranks, products of adapters.
    `tsv`, `wudi`, `star`, `knots`, `isotropic` and `subspace_boosting` keep the singular vectors of full fine-tunes
    beyond it, 3 to 11 times the size of a model, unless it is 0: then they compute them for each candidate."""
    quantize: Format | None = None
    """The format in which the model will be served: GGUF's `q8_0` or `q4_0`, or `fp8` (e4m3, a scale for each output
    channel). Merged weights are rounded to it and back before they are scored; the engine computes in its own type."""
    quantize_at: Literal["finalists", "all"] = "finalists"
    """Which candidates are scored in that format. `finalists`: the search scores merges as they are, and finalists
    answer all their questions once more in the format, which chooses the best. `all`: every candidate."""
    workers: Literal["auto"] | Annotated[int, Field(ge=1)] | Elastic = "auto"
    """How many engines score candidates at the same time: `8`, or with `on: ray` also `{min: 2, max: 32}`. `auto`: one
    for each GPU of this machine (or for so many as `gpus_per_worker` says), or one."""
    on: Literal["processes", "ray"] | None = None
    """Where workers run. `processes`: each in a process of this machine. `ray`: on a Ray cluster. By default one worker
    runs in this process, and several in processes."""
    address: str | None = None
    """For `ray`: the cluster's address. `auto`: the one that this machine belongs to, or RAY_ADDRESS;
    `ray://HOST:10001`: another one; `none`, the default: a new one on this machine. `backend: auto` is
    resolved on this machine, not on the workers'."""
    gpus_per_worker: float | None = Field(default=None, gt=0)
    """GPUs of a worker: a whole number, or a share such as 0.5. Default: where there are GPUs, as many as vLLM uses by
    `options` (tensor_parallel_size), or one. For a Ray cluster whose GPUs come later, say `1`."""

    @field_validator("workers", mode="before")
    @classmethod
    def _counted(cls, value: object) -> object:
        if isinstance(value, str) and value.isdigit():
            value = int(value)
        if value == "auto" or isinstance(value, Elastic) or (type(value) is int and value >= 1):
            return value
        if isinstance(value, Mapping):
            keys, given = [*Elastic.model_fields], dict[Any, Any](value)
            for key in given.keys() - {*keys}:
                raise ValueError(f"there is no key {key!r} in it{nearest(str(key), keys)}")
            if "max" in given and all(type(of) is int and of >= 1 for of in given.values()):
                if given.get("min", 1) > given["max"]:
                    raise ValueError(f"min ({given['min']}) is more than max ({given['max']})")
                return given
        raise ValueError("give a number of 1 or more, `auto`, or with `on: ray` such as {min: 2, max: 32}")

    @field_validator("quantize", mode="before")
    @classmethod
    def _known_format(cls, value: object) -> object:
        if value is None or value in FORMATS:
            return value
        known = f"give {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, or leave it out to score merges as they are"
        if isinstance(value, str) and re.fullmatch(r"q\d_k(_\w+)?|iq\d\w*|q[3-6]_\d", value, re.IGNORECASE):
            nearest = "q8_0" if value[1] in "678" else "q4_0"
            raise ValueError(f"{value!r} cannot be rounded to here, {nearest} comes nearest; {known}")
        raise ValueError(f"{value!r} is no known format; {known}")

    @field_validator("address")
    @classmethod
    def _somewhere(cls, value: str | None) -> str | None:
        if value not in (None, "auto", "none") and not re.fullmatch(r"(ray://)?[^/\s]+:\d+", value):
            raise ValueError("give `auto`, `none` or an address such as ray://HOST:10001")
        return value

    @field_validator("gpus_per_worker")
    @classmethod
    def _on_one_machine(cls, value: float | None) -> float | None:
        if value is not None and value > 1 and value != int(value):
            raise ValueError("give a whole number, or a share below 1")
        return value

    @model_validator(mode="after")
    def _has_format(self) -> Self:
        if self.quantize is None and self.quantize_at == "all":
            raise ValueError(
                f"quantize_at: {self.quantize_at} says when to round weights, and `quantize` to what: add `quantize:"
                f" q4_0` (or {', '.join(each for each in FORMATS if each != 'q4_0')}), or leave quantize_at out"
            )
        return self

    @property
    def search_format(self) -> str:
        """The format in which every candidate is scored; empty where the search scores merges as they are."""
        return self.quantize or "" if self.quantize_at == "all" else ""

    @property
    def finals_format(self) -> str:
        """The format in which finalists are scored once more; empty where they are not."""
        return self.quantize or "" if self.quantize_at == "finalists" else ""

    @model_validator(mode="after")
    def _places_fit(self) -> Self:
        if isinstance(self.workers, Elastic) and self.on != "ray":
            raise ValueError("workers with {min, max} need `on: ray`; give one number, such as `workers: 4`")
        if self.address is not None and self.on != "ray":
            raise ValueError("address is for `on: ray` only; add `on: ray`, or leave it out")
        if self.workers == "auto" and self.address not in (None, "none"):
            raise ValueError(
                "give the number of `workers` on the cluster, such as 8, or {min: 2, max: 8}; `auto` counts the GPUs of"
                " this machine"
            )
        if self.gpus_per_worker and self.gpus_per_worker < self._parallel > 1 and self.backend != "hf":
            raise ValueError(
                f"gpus_per_worker {self.gpus_per_worker:g} is less than the {self._parallel} GPUs that `options` spread"
                " vLLM over; leave it out, or give as many"
            )
        return self

    @property
    def _parallel(self) -> int:
        """The GPUs that one engine of vLLM is spread over."""
        sizes = [self.options.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline")]
        return math.prod(size for size in sizes if isinstance(size, int))

    @property
    def gpus(self) -> float | None:
        """GPUs of a worker, if the config says so; None for one, where there are any."""
        return self.gpus_per_worker or (self._parallel if self._parallel > 1 else None)

    @property
    def most_workers(self) -> int | None:
        """The largest number of workers; None for `auto`, one where the device is a given one."""
        if isinstance(self.workers, Elastic):
            return self.workers.max
        if self.workers == "auto":
            return 1 if self.device not in (None, "cuda") else None
        return self.workers

    @model_validator(mode="after")
    def _own_devices(self) -> Self:
        if self.device and ":" in self.device and (self.most_workers or 1) > 1:
            raise ValueError(
                f"device {self.device!r} is one GPU, and each of {self.most_workers} workers has GPUs of its own; leave"
                " the device out, and choose the GPUs with the environment variable CUDA_VISIBLE_DEVICES"
            )
        return self


class Config(Section):
    """A config file. The files of mergekit-evolve and LLM-Evo-Merge are valid configs.

    >>> import llmevo
    >>> genome = {"models": ["one", "two"], "merge_method": "linear"}
    >>> config = llmevo.Config.model_validate({"genome": genome, "tasks": [{"name": "letters", "weight": 1.0}]})
    >>> config.search.optimizer, config.search.budget.evaluations
    ('llm', 100)
    """

    genome: Genome
    tasks: list[Task] = Field(min_length=1)
    """The tasks of the search."""
    heldout: list[Task] = Field(default_factory=list[Task])
    """Tasks that are scored only at the end; they share no question with `tasks`."""
    constraints: list[str] = Field(default_factory=list[str])
    """Bounds on the metrics of `tasks`: `["arc >= parent - 0.01", "gsm8k >= 0.4"]`, or one such text. `parent` is the
    best parent's score on that task, `uniform` the uniform merge's. Candidates that violate a constraint rank below all
    that satisfy it. For layer paths also `layers`, `parameters` and `time` (see `search.sizes`): `layers <= 30`,
    `parameters <= 1.5e9`, `time <= 0.9`."""
    allow_benchmark_tasks: bool = False
    """Allow search tasks on the test split of a public benchmark; held-out tasks may always use it."""
    gate: Annotated[Gate | None, Switch] = None
    """Fail candidates whose short replies are empty, loop, or are in another language or script than the prompts and
    the parents' replies. `true`, or a mapping such as `{prompts: prompts.txt, tokens: 48}`."""
    split: Split | None = None
    """Split the questions of `tasks` into disjoint sets, such as `{search: 0.5, selection: 0.2, heldout: 0.3}`; then
    `heldout:` needs no tasks of its own."""
    limit: int | None = Field(default=None, ge=1)
    """Maximum number of questions of a search task."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Solved examples before each question; by default the task's own number."""
    shuffle: bool = False
    """Choose the questions within `limit` at random instead of the first ones."""
    random_init: bool = False
    """Score a random point as one more start row, after the uniform merge and the models alone."""
    apply_chat_template: bool = True
    """Ask the questions as chat messages, in the base model's chat template."""
    fewshot_as_multiturn: bool = True
    """In a chat, give each solved example as a turn of its own."""
    task_search_path: list[Path] = Field(default_factory=list[Path])
    """Folders with your own lm-eval task files."""
    search: Search = Search()
    llm: Llm = Llm()
    engine: Engine = Engine()
    loggers: list[dict[str, Any]] = Field(default_factory=list[dict[str, Any]])
    """Trackers that `llmevo run` and `resume` send scores, genes and thoughts to: `wandb`, `tensorboard`, `mlflow`;
    names, or mappings with options: `{name: wandb, project: merges}`."""

    @field_validator("loggers", mode="before")
    @classmethod
    def _known_loggers(cls, value: Any) -> Any:
        return read_loggers(value)

    @field_validator("constraints", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("constraints")
    @classmethod
    def _readable(cls, value: list[str]) -> list[str]:
        return [Constraint.parse(text).text for text in value]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """Find the mistakes that follow from several sections."""
        if self.heldout and self.split and self.split.heldout:
            raise ValueError(
                f"split.heldout: {self.split.heldout:g} of the search tasks is held out, and `heldout:` lists tasks as"
                " well; keep one of the two"
            )
        names = [task.name for task in self.tasks]
        if self.search.sizes and not self.objective.pareto:
            raise ValueError(
                f"search.sizes: {self.search.sizes[0]} is one of several objectives, and the objective is a sum; add"
                " `objective: pareto`, or bound it with `constraints: [layers <= 30]`"
            )
        for constraint in self.objective.constraints:
            if constraint.task not in names and not self.objective.is_size(constraint.task):
                raise ValueError(
                    f"constraints: {constraint.text!r} names {constraint.task!r}, which is not in `tasks:`"
                    f"{nearest(constraint.task, [*names, *SIZES])}"
                )
        if self.objective.pareto and len(self.objective.objectives) < 2:
            raise ValueError("search.objective: pareto needs two tasks or more; there is one, so use `sum`")
        idle = [task.name for task in self.tasks if not task.weight]
        if self.objective.pareto and idle:
            raise ValueError(
                f"search.objective: with pareto the sign of a weight says which way is better, and {idle[0]} has the"
                " weight 0; give it 1, or -1 where lower is better"
            )
        form = self.engine.finals_format
        if form and not self.search.finalists:
            raise ValueError(
                f"engine.quantize: {form} is for finalists, and search.finalists is 0; give finalists, such as 4, or"
                " score every candidate so with engine.quantize_at: all"
            )
        if form and (voted := next((task.name for task in self.tasks if task.votes), None)):
            raise ValueError(
                f"engine.quantize: a person would vote on {voted} for every finalist once more; score every candidate"
                f" in {form} with engine.quantize_at: all, or leave quantize out"
            )
        self._check_mixtures()
        prices = [self.llm.price, *(task.judge.price for task in self.tasks if task.judge)]
        if self.search.budget.cost is not None and not any(price.prompt or price.completion for price in prices):
            raise ValueError(
                f"search.budget: a bound on the cost ({self.search.budget.cost:g}) needs prices per million tokens;"
                " add them, such as `llm: {price: {prompt: 2.5, completion: 10}}`"
            )
        return self

    def _check_mixtures(self) -> None:
        """Raise ValueError for what candidates that are mixtures of experts cannot have."""
        if self.genome.architecture != "moe":
            return
        engine, refused = self.engine, "genome.architecture: moe"
        if self.has_paths:
            raise ValueError(f"{refused}: a mixture has all layers of its models; choose an optimizer without paths")
        if engine.backend == "vllm":
            raise ValueError(
                f"{refused}: candidates are scored with engine.backend: hf; the exported model runs in vLLM"
            )
        if engine.quantize:
            raise ValueError(f"{refused}: engine.quantize has no formats of mixtures; leave it out")
        if engine.on == "ray":
            raise ValueError(f"{refused}: routers are fitted on one machine; leave engine.on out, or use on: processes")
        judged = next((task.name for task in self.tasks if task.judge), None)
        if judged and (engine.most_workers or 1) > 1:
            raise ValueError(
                f"{refused}: workers fit the routers from scores, and no worker asks the judge of {judged}; leave"
                " engine.workers out"
            )
        if self.genome.tokenizer_source not in (None, "base"):
            raise ValueError(f"{refused}: experts share the base's tokenizer; leave genome.tokenizer_source out")

    @property
    def evaluation_seed(self) -> int:
        """The seed of random masks, shuffled questions and few-shot examples."""
        return self.search.seed if self.search.evaluation_seed is None else self.search.evaluation_seed

    @property
    def racing(self) -> Racing | None:
        """The racing in use: none with several objectives, as a candidate behind in the sum may be the best at a task,
        and the front compares scores on the same questions.
        """
        return None if self.search.objective == "pareto" else self.search.racing

    @property
    def has_paths(self) -> bool:
        """Whether candidates may be layer paths."""
        return self.search.optimizer in PATHS or self.search.spaces == "both" or self.genome.path is not None

    @property
    def objective(self) -> Objective:
        """The objective and the constraints."""
        constraints = tuple(map(Constraint.parse, self.constraints))
        sizes = tuple(self.search.sizes)
        return Objective(self.counted, constraints, self.search.objective, self.search.seed, sizes)

    @property
    def asking(self) -> AskingOptions:
        """The asking options of search tasks."""
        looks = self.racing.looks if self.racing else 1
        share = (0.0, self.split.search) if self.split else None
        return replace(self._asked, limit=self.limit, share=share, blocks=looks)

    @property
    def selection_asking(self) -> AskingOptions | None:
        """The asking options of the finalists' further questions; None if there are none."""
        if not self.search.finalists:
            return None
        if self.split:
            low, high = self.split.search, self.split.search + self.split.selection
            return replace(self._asked, share=(low, high)) if high > low else None
        return replace(self._asked, after=self.limit, limit=self.limit) if self.limit else None

    @property
    def heldout_asking(self) -> AskingOptions:
        """The asking options of held-out tasks: all their questions."""
        if self.split and self.split.heldout:
            low = self.split.search + self.split.selection
            return replace(self._asked, share=(low, low + self.split.heldout), shuffle=False)
        return replace(self._asked, shuffle=False)

    @property
    def heldout_tasks(self) -> list[Task]:
        """The held-out tasks: those of `heldout:`, or the search tasks with `split.heldout`."""
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
        """{search task: (weight, metric)}."""
        return {task.name: (task.weight, task.metric) for task in self.tasks}


def read_config(file: Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a config file, with overrides such as `{"search.budget": 10}`.

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
    """Read a config from plain values of `origin`; see `read_config`."""
    if not isinstance(raw, dict):
        this = "it is empty" if raw is None else f"it is {shortened(repr(raw), 80)}"
        raise ConfigError(f"{origin}: {this}; a config is a mapping with `genome:` and `tasks:`")
    if "merge_method" in raw and not {"genome", "tasks"} & raw.keys():
        raise ConfigError(
            f"{origin}: this is a recipe, not the config of a search; merge it with `llmevo merge`, or write a config"
            " with `llmevo init`"
        )
    return _validated(_changed(raw, overrides or {}), origin)


def config_text(file: Path, changes: Mapping[str, Any] | None = None) -> str:
    """Return a config file's text; with changes such as `{"search.budget": 10}`, the same values and those in YAML."""
    text = file.read_text()
    if not changes:
        return text
    return yaml.safe_dump(_changed(read_yaml(text), changes), sort_keys=False, width=100)


def _changed(values: Any, changes: Mapping[str, Any]) -> Any:
    """Return plain values with others at some paths. Raises ConfigError where a path leads nowhere."""
    for path, value in changes.items():
        values = _replaced(values, path.split("."), value, path)
    return values


def _replaced(values: Any, keys: Sequence[str], value: Any, path: str) -> Any:
    """Return a copy of plain values with another value at a path. Raises ConfigError where the path leads nowhere."""
    if not keys:
        return value
    key, *rest = keys
    if isinstance(values, list):
        found: list[Any] = [*values]
        if not (key.isascii() and key.isdigit() and int(key) < len(found)):
            raise ConfigError(
                f"{path}: there is no entry {key!r} in a list of {len(found)}; count from 0, or set the whole list"
            )
        found[int(key)] = _replaced(found[int(key)], rest, value, path)
        return found
    if values is None or values is True:  # a section that is empty, or enabled with its defaults
        values = {}
    if not isinstance(values, dict):
        parent = ".".join(path.split(".")[: -len(keys)])
        raise ConfigError(f"{path}: {parent} is {shortened(repr(values), 80)}, which has no keys; set {parent} itself")
    return {**values, key: _replaced(values.get(key), rest, value, path)}


def parse_changes(texts: Sequence[str]) -> dict[str, Any]:
    """Read the changes of `--set`, `KEY=VALUE` with a path of keys and YAML: `{"search.budget": 50}`.

    Raises ConfigError.
    """
    found: dict[str, Any] = {}
    for text in texts:
        path, equals, value = text.partition("=")
        path = path.strip()
        if not equals or not all(path.split(".")):
            raise ConfigError(f"--set: {text!r} is no KEY=VALUE; write for example `--set search.budget=50`")
        try:
            found[path] = read_yaml(value)
        except ValueError as error:
            raise ConfigError(f"--set {path}: {error}") from error
    return found


def with_places(config: Config, **places: Any) -> Config:
    """Return a config with other values of `engine` that say where its workers run. Raises ConfigError."""
    values = config.model_dump(mode="json", exclude_unset=True)
    return _validated({**values, "engine": {**values.get("engine", {}), **places}}, "the config", LOGGED)


def parse_logged(raw: Mapping[str, Any], origin: str) -> Config:
    """Return the config in a log of this version or of an earlier one, whose removed keys and values are accepted."""
    return _validated(without_removed(raw), origin, LOGGED)


def _validated(values: Mapping[str, Any], origin: str, context: str | None = None) -> Config:
    try:
        return Config.model_validate(values, context=context)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{origin}: {explain(detail, Config)}" for detail in error.errors()[:5])) from None
