"""The config of a run: its sections together, and what follows from several of them; read from a file."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from llmevo.aims import Aims, Constraint
from llmevo.errors import ConfigError, nearest
from llmevo.genome import Genome
from llmevo.loggers import read_loggers
from llmevo.mistakes import explained
from llmevo.schema import Engine, Gate, Llm, Racing, Search, Section, Split, switched
from llmevo.strict_yaml import read_yaml
from llmevo.tasks import Protocol, Task

LINEAR = ("linear", "task_arithmetic")
"""The methods whose merges are linear in the models."""


class Config(Section):
    """A whole config file. The files of mergekit-evolve and LLM-Evo-Merge are configs as they are."""

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
    `llmevo.tasks.benchmarks`; held-out tasks may be any."""
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

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.engine.adapters == "together" and (why := self._apart()):
            raise ValueError(f"engine.adapters: 'together' cannot be: {why}; set `engine: {{adapters: merged}}`")
        return self

    def _apart(self) -> str:
        """Why candidates cannot be asked together; empty where they can, as far as the config says."""
        genome = self.genome
        if self.engine.backend == "vllm":
            return "engine.backend is 'vllm', and only hf asks several candidates in one batch"
        if others := [method.name for method in genome.methods if method.name not in LINEAR]:
            return f"merge_method {others[0]!r} is not linear in the models, as {' and '.join(LINEAR)} are"
        if genome.normalize is False and any(method.name == "linear" for method in genome.methods):
            return "without `normalize`, linear scales the base as well"
        base = (genome.base_model or genome.models[0]).model
        if strangers := [one for one in genome.references if one.model != base]:
            return f"{strangers[0]} is no LoRA adapter of {base} (write {base}+ADAPTER)"
        if genome.base_model and genome.base_model.lora:
            return f"base_model {genome.base_model} has an adapter of its own"
        if not any(reference.lora for reference in genome.references):
            return f"none of the models is a LoRA adapter of {base}"
        if self.gate:
            return "`gate:` reads the replies of merged candidates"
        if judged := [task.name for task in self.tasks if task.judge or task.votes]:
            return f"{judged[0]} is judged candidate by candidate"
        return ""

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
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(
            "\n".join(f"{origin}: {explained(detail, Config)}" for detail in error.errors()[:5])
        ) from None
