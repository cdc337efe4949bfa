"""Judges: another LLM that grades what a candidate writes, and a person who votes on it.

`settings` is what a config says of them; `judge` asks the LLM, `poll` keeps the person's votes and makes scores of
them, `booth` shows replies and takes votes. What was judged and voted is kept in a `Book`, which a run's log fills
again: nothing is asked twice.
"""

from llmevo.judging.book import Book
from llmevo.judging.settings import Judge, Votes
from llmevo.judging.statements import Judgement, Presentation, Vote

__all__ = ["Book", "Judge", "Judgement", "Presentation", "Vote", "Votes"]
