"""Tasks of the user's own prompts: an LLM judges the replies (`judge:`), or a person votes on them (`votes:`)."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from llmevo.errors import TaskError, nearest
from llmevo.evaluation.judges.judge import LlmJudge, Rubric, Written
from llmevo.evaluation.judges.verdicts import (
    AskVoter,
    Choice,
    Pair,
    Poll,
    Presentation,
    ShownPair,
    VerdictMemory,
    Vote,
    digest,
)
from llmevo.evaluation.tasks.lm_eval import JudgedTask, config_of_rows
from llmevo.evaluation.tasks.task import Task

Aggregation = str | Callable[[Sequence[Any]], float]


class GradedTask(JudgedTask):
    """The leaf of a line with `judge:`. Its metric `judge` is the mean over prompts of a score from 0 to 1, see
    `LlmJudge`, and `unreadable` the share of replies without a readable verdict.
    """

    def __init__(self, task: Task, root: Path, _: Any) -> None:
        """Raises TaskError for prompts or a rubric that cannot be used."""
        assert task.judge
        rows = _read_prompts(task.name, root / str(task.prompts))
        super().__init__(_config(task, rows, {"judge": ("mean", True), "unreadable": ("mean", False)}))
        rubric = Rubric(task.name, task.judge, root)
        self._make_judge = partial(LlmJudge, task.name, task.judge, root, rubric)
        self.fingerprint = hashlib.sha256(json.dumps([rubric.texts, rows]).encode()).hexdigest()
        self.texts = {f"{task.name}/{name}": text for name, text in rubric.texts.items()}
        self._scores: dict[Written, float | None] = {}

    def inquiries(self, document: Mapping[str, str]) -> int:
        return 2 if document["reference"] else 1

    @cached_property
    def judge(self) -> LlmJudge:
        return self._make_judge()

    def open(self) -> None:
        """Raises ProposerRefused where a key is missing."""
        _ = self.judge

    def check(self) -> None:
        """Raises ProposerRefused where the judge's server does not answer, or refuses the key."""
        self.judge.check()

    def consider(self, written: list[tuple[Mapping[str, str], str]], verdicts: VerdictMemory) -> None:
        """Raises JudgeError when the judge is lost."""
        replies = [Written(document["prompt"], reply, document["reference"]) for document, reply in written]
        self._scores = dict(zip(replies, self.judge.scores(replies, verdicts), strict=True))

    def result(self, document: Mapping[str, str], replies: Sequence[str]) -> dict[str, float]:
        score = self._scores[Written(document["prompt"], str(replies[0]), document["reference"])]
        # The lowest grade for a reply without a verdict: see `llmevo.evaluation.judges.judge`.
        return {"judge": round(score or 0.0, 4), "unreadable": float(score is None)}


class VotedTask(JudgedTask):
    """The leaf of a line with `votes:`. Its metric `votes` is the probability that a reply of the candidate is
    preferred to one of the first candidate's, see `Poll`.

    A vote is on a pair of replies, so a candidate's score is no mean over questions: it depends on its opponents, and
    on all other votes. It is computed when the replies of a candidate are complete, and every question has it as its
    result.
    """

    def __init__(self, task: Task, root: Path, _: Any) -> None:
        """Raises TaskError for prompts that cannot be used."""
        assert task.votes
        rows = _read_prompts(task.name, root / str(task.prompts))
        # The standard error has lm-eval's name for it.
        metrics = {"votes": (lambda values: values[0][0], True), "votes_stderr": (lambda values: values[0][1], False)}
        super().__init__(_config(task, rows, metrics))
        self.pairs = task.votes.pairs
        self._score = 0.0, 0.0

    def consider(self, written: list[tuple[Mapping[str, str], str]], verdicts: VerdictMemory) -> None:
        """Raises TaskError without a terminal to ask a person in, and KeyboardInterrupt when the person stops."""
        prompts = [document["prompt"] for document, _ in written]
        replies = [reply for _, reply in written]
        name, player = digest(self.task_name, prompts), digest(replies)
        poll = verdicts.poll(name)
        known = player in poll.replies
        verdicts.note(Presentation(task=self.task_name, poll=name, player=player, replies=[] if known else replies))
        left = poll.left(player, self.pairs, self.seed)
        for place, pair in enumerate(left):
            choice = self._ask(verdicts.ask_voter, poll, player, pair, prompts[pair.prompt], len(left) - place)
            verdicts.note(
                Vote(task=self.task_name, poll=name, player=player, other=pair.other, prompt=pair.prompt, choice=choice)
            )
        self._score = poll.score(player)

    def _ask(self, ask_voter: AskVoter | None, poll: Poll, player: str, pair: Pair, prompt: str, left: int) -> Choice:
        if ask_voter is None:
            raise TaskError(
                f"tasks: {self.task_name} is voted on by a person, and there is no terminal to ask in; run it in one"
            )
        names = [player, pair.other] if pair.own_first else [pair.other, player]
        first, second = (poll.replies[name][pair.prompt] for name in names)
        chosen = ask_voter(ShownPair(self.task_name, prompt, first, second, left))
        if chosen in ("tie", "skip"):
            return chosen
        return "own" if (chosen == "first") == pair.own_first else "other"

    def result(self, document: Mapping[str, str], replies: Sequence[str]) -> dict[str, Any]:
        return {"votes": self._score, "votes_stderr": self._score}


def _config(task: Task, rows: list[dict[str, str]], metrics: Mapping[str, tuple[Aggregation, bool]]) -> dict[str, Any]:
    """`metrics` are aggregations, and whether higher is better, by name."""
    options = task.judge or task.votes
    assert options
    return config_of_rows(
        task.name,
        rows,
        output_type="generate_until",
        doc_to_text="prompt",
        doc_to_target="reference",
        generation_kwargs={"until": [], "max_gen_toks": options.reply_tokens, "do_sample": False},
        metric_list=[
            {"metric": name, "aggregation": aggregation, "higher_is_better": better}
            for name, (aggregation, better) in metrics.items()
        ],
    )


def _read_prompts(name: str, file: Path) -> list[dict[str, str]]:
    """The prompts in a file, each with its reference reply (empty where there is none): JSON Lines with `prompt` and
    perhaps `reference` where its name or first line says so, else a prompt a line. Raises TaskError with the line.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise TaskError(f"tasks: {name}: there is no file {file}; `prompts:` starts at the config's folder") from None
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"tasks: {name}: {file} cannot be read ({error})") from error
    rows: list[dict[str, str]] = []
    is_json = file.suffix.lower() == ".jsonl" or _is_object(next(filter(str.strip, lines), ""))
    if file.suffix.lower() == ".json" and not is_json:
        raise TaskError(f"tasks: {name}: {file} has no JSON object with `prompt` in its first line; write one a line")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"tasks: {name}: {file}:{number}"
            rows.append(_row(line, place) if is_json else {"prompt": line.strip(), "reference": ""})
    if not rows:
        raise TaskError(f"tasks: {name} has no questions: {file} is empty")
    return rows


def _is_object(line: str) -> bool:
    """Whether a line is a JSON object with a prompt."""
    with suppress(ValueError):
        row: Any = json.loads(line)
        return isinstance(row, dict) and "prompt" in row
    return False


def _row(line: str, place: str) -> dict[str, str]:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise TaskError(f"{place}: is not JSON ({error}); write one object a line, or plain lines in a .txt") from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise TaskError(f'{place}: has no `prompt`; write {{"prompt": "…"}}, and a "reference" if you like')
    for key in row.keys() - {"prompt", "reference"}:
        hint = nearest(key, ["prompt", "reference"])
        if hint.startswith(","):  # others, such as a number, may stand there
            raise TaskError(f"{place}: unknown key {key!r}{hint}")
    reference = row.get("reference")
    if reference is not None and not isinstance(reference, str):
        raise TaskError(f"{place}: its `reference` is {reference!r}; give a text, a reply to compare others with")
    return {"prompt": row["prompt"], "reference": reference or ""}
