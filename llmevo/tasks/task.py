"""One line of `tasks:`."""

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
