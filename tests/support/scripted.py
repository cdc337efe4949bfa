"""Workers without models: what they score, how long they take and how they end follows from a script.

This module loads no torch, so that a worker starts in a third of a second.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from llmevo.errors import CandidateError, MachineError, SourceError
from llmevo.evaluation.responses import Responses
from llmevo.evaluation.score import Score
from llmevo.merging.recipe import Recipe
from llmevo.workers.protocol import Job, Request, Warn

FACTS: Mapping[str, Any] = {"engine": "scripted", "version of": {"llmevo": "1"}}
PARTS = (4, 2, 3)
"""Questions of each part."""
MARGIN = 0.3
"""A raced recipe is stopped when it is so far behind its best rival."""
FOREVER = 600.0


@dataclass(frozen=True)
class Script:
    """What workers do, by the place where they do it: `import`, `greet`, `load`, a request's id, or (id, part).

    An act is a word: `wait 0.2`, `die` (kill -9), `exit`, `chatter` (print much, then exit), `hang`, `refuse`, `fail`
    (the candidate's fault), `lose` (the machine's), `break` (an error that nothing expects), `differ` (other facts), or
    `child` (start the process of an engine, without which nothing can be scored). With `once`, as in `die once`, only
    the worker that comes there first does it; with `ill`, all do it once there is a file `ill` in the folder.
    """

    folder: Path
    """Where workers write down what they do."""
    acts: Mapping[Any, str] = field(default_factory=dict[Any, str])
    seconds: float = 0.0
    """That each part takes."""

    def scorer_factory(self) -> "Callable[[], Scripted]":
        """Return the function that makes the scorer in a worker."""
        return partial(Scripted, self)

    def lines(self) -> list[tuple[int, list[str]]]:
        """Return (process, words) of all that the workers wrote, the oldest first."""
        file = self.folder / "diary"
        rows = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
        return [(int(process), words) for process, *words in rows]

    def asked(self) -> list[tuple[str, int]]:
        """Return (id, part) of each part that a worker was asked, with repetitions."""
        return [(words[1], int(words[2])) for _, words in self.lines() if words[0] == "asked"]

    def children(self) -> list[int]:
        """Return the processes of engines, the oldest first."""
        return [int(words[1]) for _, words in self.lines() if words[0] == "child"]

    def processes(self, did: str = "") -> list[int]:
        """Return the processes that wrote lines that begin with these words, the oldest first, each once."""
        return [*dict.fromkeys(process for process, words in self.lines() if " ".join(words).startswith(did))]


@dataclass
class Scripted:
    """A `PartScorer` by a script."""

    script: Script
    child: subprocess.Popen[bytes] | None = None
    warn: Warn = field(default=lambda _: None)

    def __post_init__(self) -> None:
        self._act("import")

    def facts(self) -> Mapping[str, Any]:
        self._write("greets")
        return {**FACTS, "dtype": "other"} if self._act("greet") == "differ" else FACTS

    def start(self) -> None:
        self._write("loads")
        self._act("load")

    def score_part(self, job: Job) -> tuple[Score, Mapping[str, float]]:
        name = str(job.id).replace(" ", "_")
        self._write(f"asked {name} {job.part}")
        self._act(job.id)
        self._act((job.id, job.part))
        time.sleep(self.script.seconds)
        if self.child and self.child.poll() is not None:
            raise MachineError("the engine died", "engine")
        self._write(f"answers {name} {job.part}")
        return self.answers(job), {"merge": 0.25, "evaluate": 0.5}

    def answers(self, job: Job) -> Score:
        return part_score(job)

    def _write(self, words: str) -> None:
        descriptor = os.open(self.script.folder / "diary", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, f"{os.getpid()} {words}\n".encode())
        os.close(descriptor)

    def _act(self, place: Any) -> str:
        words = self.script.acts.get(place, "").split()
        if not words or (words[-1] == "once" and not self._is_first(place)):
            return ""
        if words[-1] == "ill" and not (self.script.folder / "ill").exists():
            return ""
        match words[0]:
            case "wait":
                time.sleep(float(words[1]))
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit" | "chatter":
                print("a progress bar 100%\r" * 20_000 * (words[0] == "chatter"), file=sys.stderr)
                print("the scripted worker leaves", file=sys.stderr, flush=True)
                os._exit(3)
            case "hang":
                time.sleep(FOREVER)
            case "child":
                self.child = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({FOREVER})"])
                self._write(f"child {self.child.pid}")
            case "refuse":
                raise SourceError("the model org/none cannot be found")
            case "warn":
                self.warn(" ".join(words[1:]))
            case "fail":
                raise CandidateError(f"{place} is no model")
            case "lose":
                raise MachineError("the machine is out of memory", "memory")
            case "break":
                raise KeyError("a mistake of somebody")
            case _:
                assert words[0] == "differ", f"no act: {words}"
        return words[0]

    def _is_first(self, place: Any) -> bool:
        name = place if isinstance(place, str | int) else "-".join(map(str, place))
        try:
            (self.script.folder / f"first {name}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


Blocks = Mapping[str, list[dict[str, list[int]]]]
"""{set of questions: {task: places} of each part}."""


@dataclass
class Answering(Scripted):
    """A worker that answers a run's questions; which ones rightly follows from the recipe."""

    blocks: Blocks = field(default_factory=dict[str, list[dict[str, list[int]]]])

    def answers(self, job: Job) -> Score:
        recipe = json.dumps(job.recipe.as_dict(), sort_keys=True)
        skill = share(recipe)
        block = self.blocks[job.questions][job.part]
        items = {
            task: [float(skill > (share(job.questions, task, place) + share(recipe, task, place)) / 2) for place in own]
            for task, own in block.items()
        }
        means = {task: sum(own) / len(own) for task, own in items.items()}
        metrics = {task: {"acc,none": mean, "acc_stderr,none": 0.1} for task, mean in means.items()}
        replies = {task: ["yes" if value else "no" for value in own] for task, own in items.items()}
        return Score(sum(means.values()), 0.1, metrics, sum(map(len, items.values())), items, replies)


def share(*words: object) -> float:
    """A number from 0 to 1 that follows from the words."""
    return int(hashlib.sha256(repr(words).encode()).hexdigest()[:8], 16) / 16**8


@dataclass
class ScriptedScoring:
    """A `Scoring` of three parts."""

    scores: dict[str, Score] = field(default_factory=dict[str, Score])
    warnings: list[str] = field(default_factory=list[str])

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def known(self, request: Request) -> Score | None:
        return self.scores.get(_key(request))

    def parts(self, questions: str) -> Sequence[int]:
        return PARTS

    def is_raced(self, request: Request) -> bool:
        return bool(request.rivals)

    def asks_judges(self, questions: str) -> bool:
        return False

    def judged(self, job: Job, responses: Responses, run: str) -> Score:
        raise NotImplementedError

    def join(self, questions: str, parts: Sequence[Score]) -> Score:
        return _score([value for part in parts for value in part.item_scores["scripted"]])

    def stopped(self, request: Request, score: Score) -> Score | None:
        best = request.rivals[0].item_scores["scripted"][: score.items]
        behind = sum(best) / len(best) - score.total
        return replace(score, total=request.rivals[0].total - behind) if behind > MARGIN else None

    def keep(self, request: Request, score: Score) -> None:
        self.scores[_key(request)] = score

    def control(self) -> Job:
        return Job("control", recipe_of(0), "search", 0)


def recipe_of(number: int) -> Recipe:
    """A recipe that differs from those of other numbers."""
    models = [{"model": f"model-{number}", "parameters": {"weight": 1.0}}]
    return Recipe.model_validate({"merge_method": "linear", "dtype": "float32", "models": models})


def part_score(job: Job) -> Score:
    """The score on a part; it follows from the recipe."""
    digest = hashlib.sha256(f"{_key(job)} {job.part}".encode()).digest()
    return _score([float(byte > 100) for byte in digest[: PARTS[job.part]]])


def whole_score(request: Request) -> Score:
    """The score on all parts, one after the other in one process."""
    parts = [part_score(Job(request.id, request.recipe, request.questions, part)) for part in range(len(PARTS))]
    return ScriptedScoring().join(request.questions, parts)


def expected_score(request: Request) -> Score:
    """The score of a request, raced if it has rivals, without any workers."""
    scoring, parts = ScriptedScoring(), list[Score]()
    for part in range(len(PARTS)):
        parts.append(part_score(Job(request.id, request.recipe, request.questions, part)))
        joined = scoring.join(request.questions, parts)
        if request.rivals and part + 1 < len(PARTS) and (stopped := scoring.stopped(request, joined)):
            return stopped
    return scoring.join(request.questions, parts)


def _key(of: Request | Job) -> str:
    return f"{of.questions} {of.recipe.references[0]}"


def _score(values: Sequence[float]) -> Score:
    mean = sum(values) / len(values)
    return Score(mean, 0.1, {"scripted": {"acc,none": mean}}, len(values), {"scripted": [*values]})
