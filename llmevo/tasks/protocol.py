"""How a model is asked."""

from dataclasses import dataclass


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
