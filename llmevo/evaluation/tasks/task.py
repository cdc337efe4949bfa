"""One line of `tasks:`."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer, model_validator

from llmevo.evaluation.judges.settings import Judge, Votes


@dataclass(frozen=True)
class AskingOptions:
    """How questions are asked, and which of a task's."""

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
    """Only the questions whose hash, a number from 0 to 1, lies from the first of these to below the second."""
    after: int = 0
    """Pass over so many questions of each task, in the order that `limit` counts in: another evaluator asks them."""
    blocks: int = 1
    """Into how many parts the questions are cut, each with its share of every task: for asking one after the other."""


KINDS = ("text", "function", "judge", "votes")
"""Keys by which a line describes a task of its own; `evaluation.tasks.loading.BUILDERS` has a builder for each."""


class Task(BaseModel):
    """One line of `tasks:`: an lm-eval task or group, or a task the line itself describes; the metric that counts and
    its weight.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    """With `_train` at its end, where no task is called so: the task on the questions of its training split."""
    weight: float = 1.0
    """Negative when lower is better."""
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
            return _of_text({str(key): given for key, given in value.items()})
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
            raise ValueError(f"task {self.name!r}: what is to be replied to? Add `prompts: FILE`, with a prompt a line")
        if self.prompts is not None and not (self.judge or self.votes):
            raise ValueError(
                f"task {self.name!r}: nobody judges the replies to {self.prompts!r}; add `judge: {{model: …}}`, or"
                " `votes: {}` for yourself"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_not_given(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Lines without a kind of their own are written, and compared, as they always were."""
        return {key: value for key, value in dump(self).items() if value is not None}

    @property
    def asks_lm_eval(self) -> bool:
        """Whether the questions are those of an lm-eval task: of `questions`, or of the task's own name."""
        return self.kind in (None, "function")

    @property
    def kind(self) -> str | None:
        """The key that describes the task; None for lm-eval's own."""
        return next((kind for kind in KINDS if getattr(self, kind) is not None), None)


def _of_text(line: dict[str, Any]) -> dict[str, Any]:
    weight = line.get("weight", 1.0)
    if isinstance(weight, int | float | str):
        with suppress(ValueError):  # said where weights are read
            weight = -abs(float(weight)) or 0.0
    return {"name": Path(line["text"]).stem, "metric": "bits_per_byte,none", **line, "weight": weight}
