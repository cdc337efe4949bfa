"""A scan: what leaving out, repeating and swapping each block of layers does to the user's tasks.

Every edit of one model's own path is measured by the probability of right answers (`evaluation.gold`), on the same
questions as the model itself, so that differences are paired. Lines of JSON in the scan's folder make it resumable.
"""

import hashlib
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from llmevo.config import Config
from llmevo.errors import CandidateError, ConfigError, RecipeError, RunError, nearest, plural
from llmevo.evaluation.score import Score
from llmevo.merging.path import ROPE
from llmevo.merging.provenance import Provenance
from llmevo.merging.recipe import Recipe
from llmevo.run.scorer import Scorer
from llmevo.search.paths.edits import Edit, edited, rope_edit
from llmevo.search.paths.scanned import FILE
from llmevo.search.paths.settings import Paths
from llmevo.search.paths.space import MERGE, ROPES, PathSpace, starts
from llmevo.workers.protocol import Job, Notice, Request, Result

if TYPE_CHECKING:  # lm-eval takes seconds to import
    from llmevo.evaluation.gold import GoldAnswers, ItemScores

LIMIT = 32
"""Questions of each task by default."""
RECENT = 30
"""Rows whose pace the time left is at."""
SKIPS = (1, 2)
REPEATS = (1, 2, 4)
GAINS = (1.0, 0.5)
SHARES = (8, 4)
"""The blocks that are swapped: the models' layers, divided by these."""


@dataclass(frozen=True)
class Row:
    """One measured model: a model of the config as it is, or an edit of one."""

    kind: str
    """`model`, `skip`, `repeat`, `swap` or `rope`."""
    path: str
    """The text form; see `docs/paths.md`."""
    layers: int
    """The result's number of layers."""
    start: int = 0
    stop: int = 0
    """The block: its first layer, and the one after its last."""
    model: str = ""
    """The model that a swapped block is from."""
    gain: float = 1.0
    """Of a repeated block; of `rope` the factor."""
    score: float | None = None
    """The mean over the tasks by their weights of the probability of right answers, from 0 to 1; of a task without
    known answers it is its own metric."""
    effect: float = 0.0
    """The difference from the scanned model's score; of a model it is 0."""
    stderr: float = 0.0
    """Its standard error over the questions; of a model that of the score."""
    nats: float = 0.0
    """The same difference of mean log-probabilities; of a model the mean log-probability."""
    right: float | None = None
    """The share of right choices, over the tasks with choices."""
    tasks: Mapping[str, float] = field(default_factory=dict[str, float])
    """{task: the effect}; of a model its mean probability."""
    answers: Mapping[str, Sequence[float]] = field(default_factory=dict[str, Sequence[float]])
    """{task: the probability of each question's right answer}; of models only."""
    counted: Sequence[str] = ()
    """Tasks without known answers, of which `answers` has the metric; of models only."""
    seconds: float = 0.0
    failed: str = ""
    """Why it cannot be measured."""
    merge: str = ""
    """The digest of the merge's recipe, where the merge is in the path."""

    @property
    def name(self) -> str:
        """The model, or of an edit the first one."""
        return self.path.split()[0]

    @property
    def is_whole(self) -> bool:
        """Whether it changes all layers and has no block."""
        return self.kind == ROPE

    @property
    def group(self) -> str:
        """Rows of one group differ in the block's place only."""
        length = self.stop - self.start
        if self.is_whole:
            return f"{ROPE} {self.gain:g}"
        if self.kind == "repeat":
            return f"repeat {length}" + ("" if self.gain == 1.0 else f", gain {self.gain:g}")
        return f"swap {length}, {self.model}" if self.kind == "swap" else f"{self.kind} {length}"


@dataclass
class GoldScorer(Scorer):
    """A scorer by the probability of right answers, on at most `limit` questions of each task.

    A score's `item_scores` are these probabilities. Its `tasks` have the means of the log-probabilities (`nats`) and of
    right choices (`right`) where a task has them.
    """

    limit: int = LIMIT

    @cached_property
    def right_answers(self) -> "GoldAnswers":
        """The right answers to the questions. Starts the engine."""
        from llmevo.evaluation.gold import GoldAnswers

        return GoldAnswers.of(self.evaluator, self.engine.lm, self.limit)

    def score(self, recipe: Recipe, *_: Any, quantize: str = "", **__: Any) -> tuple[Score, Mapping[str, float]]:
        return self.score_part(Job("", recipe, "search", 0, quantize))

    def score_part(self, job: Job) -> tuple[Score, Mapping[str, float]]:
        def scored() -> tuple[Score, Mapping[str, float]]:
            answers, started = self.right_answers, time.monotonic()  # the engine starts before the clock
            try:
                self.merge(job.recipe, job.quantize)
            except RecipeError as error:
                raise CandidateError(str(error)) from error
            gold = answers.measure(self.engine.lm)
            values = gold.values
            metrics = {task: dict[str, float]() for task in values}
            for name, found in (("nats", gold.logprobs), ("right", gold.right)):
                for task, mean in _means(found).items():
                    metrics[task][name] = mean
            total, stderr = self.weighted(values)
            score = Score(total, stderr, metrics, sum(map(len, values.values())), values)
            return score, {"evaluate": time.monotonic() - started}

        return self._with_recovery(scored)

    def weighted(self, values: "ItemScores") -> tuple[float, float]:
        """Return the mean over the tasks by the size of their weights, and its standard error over the questions."""
        weights = {task: abs(self.evaluator.weights.get(task, 1.0)) for task in values}
        total = sum(weights.values()) or 1.0
        mean = sum(weights[task] * float(np.mean(of)) for task, of in values.items()) / total
        parts = (
            (weights[task] / total) ** 2 * float(np.var(of, ddof=1)) / len(of)
            for task, of in values.items()
            if len(of) > 1
        )
        return mean, math.sqrt(sum(parts))

    # For workers: one part, neither raced nor remembered

    def scorer_factory(self) -> Callable[[], Scorer]:
        return partial(open_gold_scorer, self._resolved(), self.root.absolute(), self.limit)

    def facts(self) -> Mapping[str, Any]:
        return {**super().facts(), "limit": self.limit}

    def start(self) -> None:
        _ = self.right_answers

    def known(self, request: Request) -> None:
        return None

    def parts(self, questions: str) -> list[int]:
        return [1]

    def is_raced(self, request: Request) -> bool:
        return False

    def join(self, questions: str, parts: Sequence[Score]) -> Score:
        return parts[0]

    def asks_judges(self, questions: str) -> bool:
        return False

    def keep(self, request: Request, score: Score) -> None:
        pass


def open_gold_scorer(config: Config, root: Path, limit: int) -> GoldScorer:
    """Return the scorer of a scan, in the process of a worker."""
    return GoldScorer(config, root, judges=False, limit=limit)


@dataclass
class Scan:
    """A scan of a config's models in a folder."""

    config: Config
    root: Path
    """The folder that relative references start from: the config's."""
    folder: Path
    of: str = ""
    """The name of the model whose layers are scanned, or `merge`, the uniform merge; by default the best model."""
    limit: int = LIMIT
    """Questions of each task at most."""
    step: int = 1
    """Blocks that are left out or repeated begin at every so many layers."""
    warn: Callable[[str], None] = lambda _: None
    rows: list[Row] = field(default_factory=list[Row])
    """The rows so far: models, then edits; in the order of `edits` once the scan is done."""

    @cached_property
    def scorer(self) -> GoldScorer:
        genome = self.config.genome.model_copy(update={"prepare": None})
        config = self.config.model_copy(update={"genome": genome})  # paths are of the models as they are
        given = config.genome.path or Paths()
        if given.deepest is None:  # so that an engine of fixed depth has room for a repeat
            given = given.model_copy(update={"deepest": Scorer(config, self.root).layers + max(REPEATS)})
            config = config.model_copy(update={"genome": config.genome.model_copy(update={"path": given})})
        return GoldScorer(config, self.root, warn=self.warn, limit=self.limit)

    @property
    def space(self) -> PathSpace:
        return self.scorer.space.paths

    @property
    def models(self) -> Sequence[str]:
        """The names of the models in paths, and `merge` where that is scanned."""
        return [*self.space.models, *([MERGE] if self.of == MERGE else [])]

    def check(self) -> None:
        """Raise ConfigError for a model that is not in the config, or that has too few layers."""
        if self.of and self.of not in self.models:
            raise ConfigError(f"--of {self.of!r} is no model of the config{nearest(self.of, [*self.models, MERGE])}")
        if self.scorer.layers < 3:
            raise ConfigError(f"the models have {plural(self.scorer.layers, 'layer')}; a scan needs 3 or more")

    def edits(self, root: str) -> list[Edit]:
        """Return the edits of a model's own path; its first and last layer stay."""
        layers = self.scorer.layers
        found = [Edit("skip", start, start + n) for n in SKIPS for start in range(1, layers - n, self.step)]
        found += [
            Edit("repeat", start, start + n, factor=gain)
            for n in REPEATS
            if layers + n <= self.space.deepest
            for gain in GAINS
            for start in range(1, layers - n, self.step)
        ]
        found += [rope_edit(factor) for factor in ROPES]
        for name in (name for name in self.models if name != root):
            for n in dict.fromkeys(max(1, layers // share) for share in SHARES):
                found += [Edit("swap", start, start + n, name) for start in starts(1, layers - 1, n) if start > 0]
        return found

    def run(self, watch: Callable[["Scan", Row], None] = lambda _, __: None) -> None:
        """Measure what is not measured yet, as many rows at once as there are workers, and write each as it comes.

        Raises RunError where the folder holds a scan of other models, questions or settings, and where the model cannot
        be measured.
        """
        self.check()
        known = self._open()
        try:
            whole = [str(self.space.whole(name)) for name in self.models]
            models = [Row("model", path, self.scorer.layers, merge=self._merge_in(path)) for path in whole]
            self._measure(models, known, watch)
            measured = [row for row in self.rows if row.score is not None]
            self.of = self.of or max(measured, key=lambda row: row.score or 0.0, default=self.rows[0]).name
            root = next(row for row in self.rows if row.name == self.of)
            if root.failed:
                raise RunError(f"{self.of} cannot be measured ({root.failed}); name another model with --of")
            self._measure([self._row(edit) for edit in self.edits(self.of)], known, watch, root)
        finally:
            self.scorer.close()

    def _row(self, edit: Edit) -> Row:
        """Return an edit's row, to be measured."""
        path = edited(self.space.whole(self.of), [edit])
        block = edit.start, edit.stop, edit.model, edit.factor
        return Row(edit.kind, str(path), len(path), *block, merge=self._merge_in(str(path)))

    def _merge_in(self, path: str) -> str:
        """Return the digest of the merge's recipe where the merge is in a path, whose name says nothing of weights."""
        return self._merge if MERGE in path.split() else ""

    @cached_property
    def _merge(self) -> str:
        recipe = self.recipe(str(self.space.whole(MERGE))).as_dict()
        return hashlib.sha256(json.dumps([recipe, self.config.evaluation_seed]).encode()).hexdigest()[:16]

    def _measure(
        self,
        rows: Sequence[Row],
        known: Mapping[str, Row],
        watch: Callable[["Scan", Row], None],
        root: Row | None = None,
    ) -> None:
        """Measure the rows that are not known; edits against `root`."""
        begun = len(self.rows)
        self.rows += [known[row.path] for row in rows if row.path in known]
        waiting = deque(row for row in rows if row.path not in known)
        asked: dict[int | str, Row] = {}
        while waiting or asked:
            workers = self.scorer.workers
            workers.observe = self._notice
            while waiting and (workers.free or not asked):
                row = waiting.popleft()
                asked[row.path] = row
                quantize = self.config.engine.search_format
                workers.submit(Request(row.path, self.recipe(row.path), quantize=quantize))
            result = workers.result()
            row = self._measured(asked.pop(result.id), result, root)
            self._times.append(time.monotonic())
            self.rows.append(row)
            with (self.folder / FILE).open("a") as out:
                out.write(json.dumps(asdict(row)) + "\n")
            watch(self, row)
        order = {row.path: place for place, row in enumerate(rows)}
        self.rows[begun:] = sorted(self.rows[begun:], key=lambda row: order[row.path])

    def _notice(self, notice: Notice) -> None:
        if notice.change in ("lost", "refused"):
            self.warn(f"Worker {notice.worker} is {notice.change}: {notice.reason}")

    def _measured(self, row: Row, result: Result, root: Row | None) -> Row:
        """Return a row with its result: of an edit the differences from `root`."""
        score, seconds = result.score, sum(result.seconds.values())
        if score is None:
            return replace(row, failed=result.reason, seconds=seconds)
        known = {name: {task: of[name] for task, of in score.tasks.items() if name in of} for name in ("nats", "right")}
        nats = self.scorer.weighted({task: [mean] for task, mean in known["nats"].items()})[0]
        right = float(np.mean([*known["right"].values()])) if known["right"] else None
        row = replace(row, score=score.total, right=right, seconds=seconds)
        if root is None:
            counted = [task for task in score.item_scores if task not in known["nats"]]
            tasks, answers = _means(score.item_scores), score.item_scores
            return replace(row, stderr=score.stderr, nats=nats, tasks=tasks, answers=answers, counted=counted)
        differences = {task: np.subtract(of, root.answers[task]).tolist() for task, of in score.item_scores.items()}
        effect, stderr = self.scorer.weighted(differences)
        return replace(row, effect=effect, stderr=stderr, nats=nats - root.nats, tasks=_means(differences))

    @property
    def left(self) -> int:
        """Rows that are not measured yet."""
        root = self.of or self.models[0]
        return len(self.models) + len(self.edits(root)) - len(self.rows)

    @cached_property
    def _times(self) -> list[float]:
        """When the rows that were measured now came."""
        return []

    @property
    def seconds_left(self) -> float | None:
        """The time left at the mean pace of the last rows that were measured now; None before there are two."""
        times = self._times[-RECENT:]
        return (times[-1] - times[0]) / (len(times) - 1) * self.left if len(times) > 1 else None

    @property
    def questions(self) -> Mapping[str, int]:
        """{task: the questions that were asked}."""
        return {task: len(of) for row in self.rows for task, of in row.answers.items()}

    @property
    def counted(self) -> Sequence[str]:
        """Tasks without known answers, whose own metric is counted."""
        return [*dict.fromkeys(task for row in self.rows for task in row.counted)]

    @property
    def without(self) -> Sequence[str]:
        """Tasks that are left out: judges and people are not asked for every edit."""
        return [task.name for task in self.config.tasks if task.judge or task.votes]

    def recipe(self, path: str) -> Recipe:
        """Return a row's recipe, for `llmevo merge`."""
        return self.scorer.space.decode(self.scorer.space.uniform(), path)

    @property
    def best(self) -> Sequence[Row]:
        """The edits that were measured, the best first."""
        found = [row for row in self.rows if row.kind != "model" and row.score is not None]
        return sorted(found, key=lambda row: -row.effect)

    def write_recipe(self, row: Row) -> Path:
        """Write a row's recipe into the scan's folder, with local models by their whole paths."""
        given = json.loads(json.dumps(self.recipe(row.path).as_dict()), object_hook=self._located)
        file = self.folder / "best.yml"
        seed = Provenance(self.config.evaluation_seed)
        file.write_text(f"# {row.path}\n{seed.sign(Recipe.model_validate(given))}")
        return file

    def _located(self, part: dict[str, Any]) -> dict[str, Any]:
        def whole(text: str) -> str:
            parts = ((self.root / each).resolve() if (self.root / each).exists() else each for each in text.split("+"))
            return "+".join(map(str, parts))

        return {key: whole(of) if key in ("model", "base_model") and of else of for key, of in part.items()}

    # The file

    @cached_property
    def _head(self) -> dict[str, Any]:
        scorer = self.scorer
        said = [
            scorer.checksums,
            scorer.questions["search"],
            scorer.config.genome.dtype,
            scorer.config.engine.search_format,
        ]
        digest = hashlib.sha256(json.dumps([said, self.limit], sort_keys=True).encode()).hexdigest()
        return {"scan": digest[:16], "limit": self.limit, "models": {n: str(m) for n, m in self.space.models.items()}}

    def _open(self) -> dict[str, Row]:
        """Return the rows of an earlier start by their paths."""
        file = self.folder / FILE
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                file.write_text(json.dumps(self._head) + "\n")
                return {}
            head, *lines = [*_lines(file)]
        except OSError as error:
            raise RunError(f"{file} cannot be written ({error.strerror}); name another folder with --out") from error
        except (ValueError, TypeError) as error:
            raise RunError(f"{file} is no scan ({error}); name another folder with --out, or remove it") from error
        if head.get("scan") != self._head["scan"]:
            raise RunError(
                f"{file} is of a scan of other models, questions or settings; name another folder with --out, or"
                " remove it"
            )
        rows = [Row(**line) for line in lines]
        return {row.path: row for row in rows if row.merge == self._merge_in(row.path)}


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the file's lines; cut off a last one that was not written to its end."""
    text = file.read_text()
    if text and not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        file.write_text(text)
    for line in text.splitlines():
        yield json.loads(line)


def _means(values: "ItemScores") -> dict[str, float]:
    return {task: float(np.mean(of)) for task, of in values.items()}


def luck(count: int) -> float:
    """Return by how many standard errors the best of so many edits without any effect is expected to stand out."""
    return NormalDist().inv_cdf((count - 0.375) / (count + 0.25)) if count > 1 else 0.0  # Blom 1958
