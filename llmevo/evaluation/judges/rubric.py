"""What a judge is shown and asked, and how its answer is read."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmevo.errors import TaskError
from llmevo.evaluation.judges.settings import Judge
from llmevo.llm.json import numeral, objects
from llmevo.llm.templates import Templates

FILES = ("judge_system.j2", "judge_user.j2", "repair.j2")
"""The question, and what is said when its answer cannot be used."""


RUBRIC = "judge_rubric.j2"
"""What a good reply is, where the config does not say it."""


LETTERS, QUOTED = 200, 60
"""Of a judge's reason, which are kept, and of an answer that cannot be read, which are shown."""


NAMES = ("A", "B")


CHOICES = {"A": 1.0, "B": 0.0, "TIE": 0.5}
"""What an answer says of the first reply."""


@dataclass(frozen=True)
class Inquiry:
    """One thing that a judge is asked."""

    messages: tuple[dict[str, str], ...]
    schema: Mapping[str, Any]
    read: Callable[[str], tuple[float, str]]
    """The value (0 to 1; of two replies, the share that is the first one's) and the reason in an answer.
    Raises ValueError that says what is wrong with it."""
    again: Callable[[str], str]
    """What is said of an answer with this problem."""
    key: str
    """A digest of who is asked and what is shown."""
    replies: Sequence[str]
    """What is judged."""


class Rubric:
    """The texts that a judge works by."""

    def __init__(self, task: str, judge: Judge, root: Path, templates: Templates) -> None:
        """Raises TaskError for a rubric that cannot be read or is empty. `root`: where relative paths start."""
        key = f"tasks.{task}.judge.rubric"
        self._judge, self._templates = judge, templates
        own = judge.rubric
        try:
            self.text = ((root / own).read_text("utf-8-sig") if own else templates.render(RUBRIC)).strip()
        except (OSError, UnicodeDecodeError) as error:
            raise TaskError(f"{key}: {own} cannot be read ({error})") from error
        if not self.text:
            raise TaskError(f"{key}: {own} is empty; write into it what a good reply is")

    @property
    def texts(self) -> dict[str, str]:
        """All that a judge is told, but for prompts and replies: for the log, and for digests."""
        return {**self._templates.texts(FILES), "rubric": self.text}

    def grade(self, prompt: str, reply: str) -> Inquiry:
        """How good a reply is, on the scale."""
        low, high = self._judge.scale
        grade = {"type": "number", "minimum": low, "maximum": high}
        return self._inquiry(prompt, [reply], {"grade": grade}, self._graded)

    def compare(self, prompt: str, first: str, second: str) -> Inquiry:
        """Which of two replies is better."""
        better = {"type": "string", "enum": [*NAMES, "tie"]}
        return self._inquiry(prompt, [first, second], {"better": better}, _compared)

    def _inquiry(
        self, prompt: str, replies: Sequence[str], asked: dict[str, Any], read: Callable[[dict[str, Any]], float]
    ) -> Inquiry:
        low, high = (f"{end:g}" for end in self._judge.scale)
        fence = hashlib.sha256(json.dumps([prompt, *replies]).encode()).hexdigest()[:8]  # no reply can end it early
        shown = {"rubric": self.text, "prompt": prompt, "replies": [*zip(NAMES, replies, strict=False)]}
        shown |= {"low": low, "high": high, "fence": fence}
        texts = [self._templates.render(file, **shown).strip() for file in FILES[:2]]
        messages = tuple({"role": r, "content": text} for r, text in zip(("system", "user"), texts, strict=True))
        (name,) = asked
        schema = {
            "type": "object",
            "properties": {"reason": {"type": "string"}, **asked},
            "required": ["reason", name],
            "additionalProperties": False,
        }
        key = hashlib.sha256(json.dumps([self._judge.model, messages]).encode()).hexdigest()[:16]
        return Inquiry(messages, schema, lambda text: _read(text, name, read), self._again, key, replies)

    def _again(self, problem: str) -> str:
        return self._templates.render("repair.j2", problems=problem)

    def _graded(self, answer: dict[str, Any]) -> float:
        low, high = self._judge.scale
        grade = numeral(answer["grade"])
        if not low <= grade <= high:
            raise ValueError(f"the grade {grade:g} lies outside {low:g} to {high:g}")
        return (grade - low) / (high - low)


def _compared(answer: dict[str, Any]) -> float:
    better = str(answer["better"]).strip().upper()
    if better not in CHOICES:
        raise ValueError(f"{str(answer['better'])[:20]!r} is none of A, B and tie")
    return CHOICES[better]


def _read(text: str, name: str, read: Callable[[dict[str, Any]], float]) -> tuple[float, str]:
    answers = [found for found in objects(text) if name in found]
    if not answers:
        said = f", but {' '.join(text.split())[:QUOTED]!r}" if text.strip() else ": it is empty"
        raise ValueError(f"the answer holds no JSON object with {name!r}{said}")
    return read(answers[-1]), str(answers[-1].get("reason", ""))[:LETTERS]
