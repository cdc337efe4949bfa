"""What is asked of a model, and how: the lines of `tasks:` and the protocol."""

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, model_validator


class Task(BaseModel):
    """One line of `tasks:`: an lm-eval task or group, the metric that counts and its weight."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    """With `_train` at its end, where no task is called so: the task on the questions of its training split."""
    weight: float = 1.0
    """Negative when lower is better."""
    metric: str = "acc,none"
    """`metric,filter`, as lm-eval prints them."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value


@dataclass(frozen=True)
class Protocol:
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
