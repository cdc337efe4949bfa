"""What was judged and voted in a run, so that nothing is asked twice."""

from collections.abc import Callable
from dataclasses import dataclass, field

from llmevo.evaluation.judges.poll import Poll
from llmevo.evaluation.judges.records import Judgement, Presentation, Statement, Verdict, Vote


@dataclass
class VerdictMemory:
    """All statements so far, by what they are about. Filled by `take`, from a log or as they are made."""

    verdicts: dict[str, Verdict] = field(default_factory=dict[str, Verdict])
    """By their keys."""
    polls: dict[str, Poll] = field(default_factory=dict[str, Poll])
    latest: dict[str, Presentation] = field(default_factory=dict[str, Presentation])
    """Whose replies were last put to the vote, task by task."""
    questions: str = "search"
    """Which set is being scored: what new statements are about."""
    write: Callable[[Statement], None] | None = None
    """Where a new statement goes: to a log that then has it taken; by default it is only taken."""

    def cleared(self) -> "VerdictMemory":
        """The same memory, empty: for the next of several runs that share their tasks."""
        self.verdicts, self.polls, self.latest, self.write = {}, {}, {}, None
        return self

    def note(self, statement: Statement) -> None:
        """A new statement."""
        (self.write or self.take)(statement.model_copy(update={"questions": self.questions}))

    def take(self, statement: object) -> None:
        """A statement, new or from a log."""
        match statement:
            case Judgement():
                self.verdicts |= {verdict.key: verdict for verdict in statement.verdicts}
            case Presentation():
                self.poll(statement.poll).present(statement)
                self.latest[statement.task] = statement
            case Vote():
                self.poll(statement.poll).votes.append(statement)
            case _:
                raise TypeError(f"{statement} is no statement")

    def poll(self, name: str) -> Poll:
        """The poll of that name; an empty one if it is new."""
        return self.polls.setdefault(name, Poll())

    def standing(self, task: str) -> float | None:
        """The score of whoever was last put to the vote in a task, by all votes so far; None if nobody was."""
        last = self.latest.get(task)
        return self.poll(last.poll).score(last.player)[0] if last else None
