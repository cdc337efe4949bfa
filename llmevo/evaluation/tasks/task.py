"""One line of `tasks:`, and how its questions are asked."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from llmevo.llm.client import Price

KINDS = ("text", "function", "judge", "votes")
"""Keys by which a line describes a task of its own; `evaluation.tasks.loading.BUILDERS` has a builder for each."""

MOST_WEIGHT = 1e6
"""Of a task, so that sums of weighted scores and their squares are numbers."""

SETS = {"train", "training", "search", "dev", "val", "valid", "validation", "test", "eval", "heldout", "held", "out"}
"""Words at the end of a task's name that name a set of its questions."""


@dataclass(frozen=True)
class AskingOptions:
    """The selection of a task's questions, and the form in which a model gets them."""

    limit: int | None = None
    """Questions a task at most; all by default."""
    num_fewshot: int | None = None
    """Solved examples before each question; the task's own number by default."""
    shuffle: bool = False
    """Take the questions in a random order, the same in every run with the same seed."""
    seed: int = 0
    apply_chat_template: bool = True
    fewshot_as_multiturn: bool = True
    share: tuple[float, float] | None = None
    """Only the questions whose hash, a number from 0 to 1, is at least the first of these and below the second."""
    after: int = 0
    """Skip so many questions of each task, in the order that `limit` counts in: another evaluator asks them."""
    blocks: int = 1
    """Parts of the questions, each with its share of every task, that are asked one after the other."""


class Replies(BaseModel):
    """The replies of a candidate to prompts."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    reply_tokens: int = Field(default=256, ge=1)
    """Of a reply to a prompt, at most."""


class Judge(Replies):
    """An LLM that judges replies, behind any OpenAI-compatible server."""

    model: str
    """The server's name for it."""
    base_url: str | None = None
    """Of a server of your own; OpenAI's by default."""
    api_key_file: str | None = None
    """A file that holds the key. `--api-key` is the proposing LLM's."""
    api_key_env: str | None = None
    """The environment variable that holds the key. Without this and `api_key_file`, OPENAI_API_KEY goes to OpenAI's
    server, or to that of OPENAI_BASE_URL, and to no other."""
    rubric: str | None = None
    """A text file that says what a good reply is; llmevo's `prompts/judge_rubric.j2` by default."""
    scale: tuple[float, float] = (1.0, 10.0)
    """The worst and the best grade. Replies that have a reference are compared with it instead of graded."""
    repairs: int = Field(default=2, ge=0)
    """Repetitions after an answer that cannot be read, or lies outside the scale."""
    parallel: int = Field(default=8, ge=1)
    """Requests at a time."""
    max_tokens: int = Field(default=2048, ge=16)
    """Of an answer, thoughts included."""
    timeout: float = Field(default=120.0, gt=0)
    """Seconds a request may take."""
    retries: int = Field(default=4, ge=0)
    """Further tries after a failure that may be temporary."""
    price: Price = Price()

    @field_validator("scale")
    @classmethod
    def _rising(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if scale[0] >= scale[1]:
            raise ValueError("a scale goes from the worst grade to the best, such as [1, 10]")
        return scale


class Votes(Replies):
    """A person who votes on pairs of replies, in the terminal."""

    pairs: int = Field(default=3, ge=1)
    """Votes on each candidate whose replies differ from those of all earlier ones."""


class Task(BaseModel):
    """One line of `tasks:`: an lm-eval task or group, or a task the line itself describes; the metric that counts and
    its weight.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    """With `_train` at its end, where no task is called so: the task on the questions of its training split."""
    weight: float = Field(default=1.0, ge=-MOST_WEIGHT, le=MOST_WEIGHT)
    """Negative when lower is better; at most a million."""
    metric: str = "acc,none"
    """`metric,filter`, as lm-eval prints them."""
    text: str | None = None
    """A text file, UTF-8: how well a model predicts it, in bits per byte (the metric is `bits_per_byte,none`). The name
    is the file's by default. Lower is better and the weight only says how much it counts: 0.2 and -0.2 both take 0.2
    points from the objective for each bit per byte, and -0.2 is what the log and the reports show."""
    function: str | None = None
    """`FILE.py:NAME`: a Python function that scores what the model writes to the task's questions. It takes the
    question's document, a dict, and the reply, a str, and gives a number (the metric is `NAME,none`, the mean)."""
    questions: str | None = None
    """For `function`: the lm-eval task whose questions are asked; `name` by default."""
    judge: Judge | None = None
    """An LLM that judges what a candidate writes to `prompts` (the metric is `judge,none`, 0 to 1)."""
    votes: Votes | None = None
    """A person who votes on it (the metric is `votes,none`, 0 to 1)."""
    prompts: str | None = None
    """For `judge` and `votes`: a file with a prompt a line, or JSON Lines with `prompt` and perhaps `reference`, a
    reply that a judge compares others with."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: object) -> object:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, Mapping) and isinstance(value.get("text"), str):
            line: dict[str, Any] = {str(key): given for key, given in value.items()}
            weight = line.get("weight", 1.0)
            with suppress(ValueError, TypeError):  # an invalid weight is refused where weights are read
                weight = -abs(float(weight)) or 0.0
            name = Path(line["text"]).stem
            return {"name": name, "metric": "bits_per_byte,none", **line, "weight": weight}
        if isinstance(value, Mapping) and isinstance(value.get("function"), str):
            return {"metric": f"{value['function'].rpartition(':')[2]},none", **value}
        if isinstance(value, Mapping) and (judged := [kind for kind in ("judge", "votes") if kind in value]):
            return {"metric": f"{judged[0]},none", **value}
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) > 1:
            raise ValueError(f"task {self.name!r}: {' and '.join(given)} are two kinds of task; give each its own line")
        if self.text is not None and self.metric != "bits_per_byte,none":
            raise ValueError(
                f"task {self.name!r}: the metric of a text is 'bits_per_byte,none', not {self.metric!r}; leave `metric`"
                " out. Lower is better, and its weight counts against the objective, with either sign"
            )
        if self.function is not None and not all(self.function.rpartition(":")):
            raise ValueError(f"task {self.name!r}: function {self.function!r} is not of the form FILE.py:NAME")
        if self.questions is not None and self.function is None:
            raise ValueError(f"task {self.name!r}: `questions: {self.questions}` needs a `function: FILE.py:NAME`")
        if (self.judge or self.votes) and self.prompts is None:
            raise ValueError(f"task {self.name!r}: the prompts are missing; add `prompts: FILE`, with a prompt a line")
        if self.prompts is not None and not (self.judge or self.votes):
            raise ValueError(
                f"task {self.name!r}: the replies to {self.prompts!r} have no judge; add `judge: {{model: …}}`, or"
                " `votes: {}` for yourself"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_unset_keys(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Keys without a value are left out: a plain line is written, and compared, as in all versions."""
        return {key: value for key, value in dump(self).items() if value is not None}

    @property
    def asks_lm_eval(self) -> bool:
        """True if the questions are those of an lm-eval task: of `questions`, or of the task's own name."""
        return self.kind in (None, "function")

    @property
    def kind(self) -> str | None:
        """The key that describes the task; None for lm-eval's own."""
        return next((kind for kind in KINDS if getattr(self, kind) is not None), None)


def short(names: Sequence[str]) -> list[str]:
    """Task names without the words that all of them begin or end with."""
    words = [name.split("_") for name in names]
    if len(words) < 2:
        return [*names]
    while all(len(word) > 1 for word in words) and len({word[0] for word in words}) == 1:
        words = [word[1:] for word in words]
    while all(len(word) > 1 for word in words) and len({word[-1] for word in words}) == 1:
        words = [word[:-1] for word in words]
    return ["_".join(word) for word in words]


def stem(name: str) -> str:
    """A task's name without the words that name a set of its questions."""
    words = name.split("_")
    while len(words) > 1 and words[-1] in SETS:
        words.pop()
    return "_".join(words)
