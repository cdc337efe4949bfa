"""Judges: another LLM that grades what a candidate writes, and a person who votes on it.

`settings` is what a config says of them; `judge` asks the LLM, `poll` keeps the person's votes and makes scores of
them. What was judged and voted is kept in a `VerdictMemory`, which a run's log fills again: nothing is asked twice.
"""

from llmevo.evaluation.judges.memory import VerdictMemory
from llmevo.evaluation.judges.records import Judgement, Presentation, Vote
from llmevo.evaluation.judges.settings import Judge, Votes

__all__ = ["Judge", "Judgement", "Presentation", "VerdictMemory", "Vote", "Votes"]
