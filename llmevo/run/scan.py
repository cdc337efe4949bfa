"""A scan: what leaving out, repeating and swapping each block of layers does to the user's tasks.

Every edit of one model's own path is measured by the probability of right answers (`evaluation.gold`), on the same
questions as the model itself, so that differences are paired. Lines of JSON in the scan's folder make it resumable.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from llmevo.config import Config
from llmevo.errors import CandidateError, ConfigError, RecipeError, RunError, nearest, plural
from llmevo.merging import path as paths
from llmevo.merging.recipe import Provenance, Recipe
from llmevo.run.scorer import Scorer
from llmevo.search.paths.edits import Edit, edited
from llmevo.search.paths.settings import Paths
from llmevo.search.paths.space import MERGE, PathSpace, starts

if TYPE_CHECKING:  # lm-eval takes seconds to import
    from llmevo.evaluation.gold import Gold, GoldAnswers, ItemScores

FILE = "scan.jsonl"
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
    """`model`, `skip`, `repeat` or `swap`."""
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
    """Of a repeated block."""
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
    seconds: float = 0.0
    failed: str = ""
    """Why it cannot be measured."""

    @property
    def group(self) -> str:
        """Rows of one group differ in the block's place only."""
        length = self.stop - self.start
        if self.kind == "repeat":
            return f"repeat {length}" + ("" if self.gain == 1.0 else f", gain {self.gain:g}")
        return f"swap {length}, {self.model}" if self.kind == "swap" else f"{self.kind} {length}"


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
    warn: Callable[[str], None] = lambda _: None
    rows: list[Row] = field(default_factory=list[Row])
    measured: int = 0
    """Rows that were measured now, not in an earlier start."""

    @cached_property
    def scorer(self) -> Scorer:
        config = self.config
        if config.genome.path is None:  # so that an engine of fixed depth has room for a repeat
            depth = Scorer(config, self.root).layers
            given = Paths(deepest=depth + max(REPEATS))
            config = config.model_copy(update={"genome": config.genome.model_copy(update={"path": given})})
        return Scorer(config, self.root, warn=self.warn)

    @property
    def space(self) -> PathSpace:
        return self.scorer.space.paths

    @cached_property
    def answers(self) -> "GoldAnswers":
        """The questions. Starts the engine."""
        from llmevo.evaluation.gold import GoldAnswers

        return GoldAnswers.of(self.scorer.evaluator, self.scorer.engine.lm, self.limit)

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
        found = [Edit("skip", start, start + n) for n in SKIPS for start in range(1, layers - n)]
        found += [
            Edit("repeat", start, start + n, factor=gain)
            for n in REPEATS
            if layers + n <= self.space.deepest
            for gain in GAINS
            for start in range(1, layers - n)
        ]
        for name in (name for name in self.models if name != root):
            for n in dict.fromkeys(max(1, layers // share) for share in SHARES):
                found += [Edit("swap", start, start + n, name) for start in starts(1, layers - 1, n) if start > 0]
        return found

    def run(self, watch: Callable[["Scan", Row], None] = lambda _, __: None) -> None:
        """Measure what is not measured yet, and write every row as it comes.

        Raises RunError where the folder holds a scan of other models, questions or settings.
        """
        self.check()
        known = self._open()
        golds: dict[str, Gold] = {}

        def model(name: str) -> "Gold":
            if name not in golds:
                row, gold = self._measure(name)
                golds[name] = gold
                if row.path not in known:
                    self._keep(row)
                    watch(self, row)
            return golds[name]

        for name in self.models:
            if (path := str(self.space.whole(name))) in known:
                self.rows.append(known[path])
            else:
                model(name)
        self.of = self.of or max(self.rows, key=lambda row: row.score or -math.inf).path.split()[0]
        edits = [(edit, edited(self.space.whole(self.of), [edit])) for edit in self.edits(self.of)]
        self.rows += [known[str(path)] for _, path in edits if str(path) in known]
        for edit, path in edits:
            if str(path) not in known:
                self._keep(self._edit(edit, path, model(self.of)))
                watch(self, self.rows[-1])

    @property
    def left(self) -> int:
        """Rows that are not measured yet."""
        root = self.of or self.models[0]
        return len(self.models) + len(self.edits(root)) - len(self.rows)

    @property
    def seconds_left(self) -> float | None:
        """The time left at the mean pace of the last rows that were measured now; None before there are two."""
        first = len(self.rows) - self.measured + 1  # the one before it started the engine
        own = [row.seconds for row in self.rows[first:]]
        return sum(own[-RECENT:]) / len(own[-RECENT:]) * self.left if own else None

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

    # One row

    def _gold(self, path: str) -> "Gold":
        engine = self.scorer.engine
        answers = self.answers
        engine.swap(self.recipe(path), self.config.engine.search_format)
        return answers.measure(engine.lm)

    def _measure(self, name: str) -> "tuple[Row, Gold]":
        path, started = str(self.space.whole(name)), time.monotonic()
        gold = self._gold(path)
        score, stderr = self._weighted(gold.values)
        row = Row(
            "model",
            path,
            self.scorer.layers,
            score=score,
            stderr=stderr,
            nats=self._weighted(gold.logprobs)[0] if gold.logprobs else 0.0,
            right=_share(gold),
            tasks=_means(gold.values),
            seconds=time.monotonic() - started,
        )
        return row, gold

    def _edit(self, edit: Edit, path: paths.Path, base: "Gold") -> Row:
        started = time.monotonic()
        given: dict[str, Any] = {"kind": edit.kind, "path": str(path), "layers": len(path)}
        given |= {"start": edit.start, "stop": edit.stop, "model": edit.model, "gain": edit.factor}
        try:
            gold = self._gold(str(path))
        except (CandidateError, RecipeError) as error:
            return Row(**given, failed=str(error), seconds=time.monotonic() - started)
        differences = _differences(gold.values, base.values)
        effect, stderr = self._weighted(differences)
        return Row(
            **given,
            score=self._weighted(gold.values)[0],
            effect=effect,
            stderr=stderr,
            nats=self._weighted(_differences(gold.logprobs, base.logprobs))[0],
            right=_share(gold),
            tasks=_means(differences),
            seconds=time.monotonic() - started,
        )

    def _weighted(self, values: "ItemScores") -> tuple[float, float]:
        """Return the mean over the tasks by the size of their weights, and its standard error over the questions."""
        weights = {task: abs(self.scorer.evaluator.weights.get(task, 1.0)) for task in values}
        total = sum(weights.values()) or 1.0
        mean = sum(weights[task] * float(np.mean(of)) for task, of in values.items()) / total
        parts = (
            (weights[task] / total) ** 2 * float(np.var(of, ddof=1)) / len(of)
            for task, of in values.items()
            if len(of) > 1
        )
        return mean, math.sqrt(sum(parts))

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
        return {row.path: row for row in (Row(**line) for line in lines)}

    def _keep(self, row: Row) -> None:
        self.rows.append(row)
        self.measured += 1
        with (self.folder / FILE).open("a") as out:
            out.write(json.dumps(asdict(row)) + "\n")


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


def _differences(values: "ItemScores", base: "ItemScores") -> "ItemScores":
    return {task: np.subtract(of, base[task]).tolist() for task, of in values.items()}


def _share(gold: "Gold") -> float | None:
    return float(np.mean([np.mean(of) for of in gold.right.values()])) if gold.right else None


def luck(count: int) -> float:
    """Return by how many standard errors the best of so many edits without any effect is expected to stand out."""
    return NormalDist().inv_cdf((count - 0.375) / (count + 0.25)) if count > 1 else 0.0  # Blom 1958
