"""The question to the LLM for layer paths, and the reading of its answer: paths in their text form."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from llmevo.errors import RecipeError
from llmevo.llm.json import objects, without_surrogates
from llmevo.llm.templates import Templates
from llmevo.merging.path import LayerPath, Limits
from llmevo.search.evidence import metric_of
from llmevo.search.paths.space import MERGE, PathSpace
from llmevo.search.prompts.chat import TOKENS, fitting
from llmevo.search.prompts.names import Names
from llmevo.search.prompts.question import Messages, Prompt, Question, Reading
from llmevo.search.prompts.reading import predicted_by
from llmevo.search.trial import Suggestion, Trial

FILES = ("paths_system.j2", "paths_user.j2", "repair.j2")
"""The templates of the prompt."""

TEXT = 4000  # characters of a path that is read
MOST = 12  # paths of an answer that are read
ANALYSIS = 800


@dataclass(frozen=True)
class Detail:
    """The length of each part of a prompt."""

    rows: int = 24
    """Paths with their scores: the best."""
    effects: int = 24
    failed: int = 4
    proposed: int = 8
    """Its earlier proposals: the latest."""
    card: int = 600
    """Characters of a model's card."""
    reason: int = 160
    """Characters of a reason, a description or a constraint."""
    tasks: int = 24
    """Tasks with scores: those with the largest weights."""
    cards: int = 24
    """Models with a card."""


DETAILS = (
    Detail(),
    Detail(rows=16, effects=16, card=300),
    Detail(rows=12, effects=12, failed=2, proposed=6, card=200, reason=100, tasks=12, cards=16),
    Detail(rows=8, effects=8, failed=2, proposed=4, card=150, reason=80, tasks=8, cards=12),
    Detail(rows=5, effects=6, failed=1, proposed=3, card=100, reason=60, tasks=6, cards=8),
    Detail(rows=3, effects=3, failed=1, proposed=2, card=0, reason=40, tasks=4, cards=0),
    Detail(rows=1, effects=1, failed=0, proposed=0, card=0, reason=0, tasks=2, cards=0),
)
"""From the fullest to the barest; the first that fits is used."""


@dataclass(frozen=True)
class PathQuestion:
    """All that the LLM may know when it is asked for paths."""

    question: Question
    paths: PathSpace
    root: str
    """The model whose path is edited."""
    others: Sequence[str]
    """What layers may be swapped from."""
    effects: Sequence[tuple[str, float, float]] = ()
    """Edits with their estimated effects on the score and standard deviations."""
    numeric: Sequence[str] = ()
    """The paths that the surrogate would try next."""
    proposed: Sequence[tuple[str, str]] = ()
    """Its earlier proposals and what became of them."""
    analysis: str = ""
    """Its last analysis."""


@dataclass(frozen=True)
class PathPrompt(Prompt):
    """A prompt for paths; simulated LLMs answer from its question."""

    about: PathQuestion | None = None


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Proposal(_Part):
    reason: str
    path: str
    predicted_score: float


class _Answer(_Part):
    analysis: str
    paths: Annotated[list[_Proposal], Field(min_length=1, max_length=4)]


class Masks:
    """The names of models in a prompt: their own, or letters."""

    def __init__(self, about: PathQuestion) -> None:
        question = about.question
        own = [*about.paths.models, MERGE]
        self.names = Names(question.space, question.tasks, question.mask_names, order=own)
        masked = {name: chr(ord("A") + place) if place < 26 else f"M{place}" for place, name in enumerate(own)}
        self.shown = {**masked, MERGE: MERGE} if question.mask_names else {name: name for name in own}
        self._own = {shown: name for name, shown in self.shown.items()}

    def hidden(self, path: LayerPath) -> LayerPath:
        """Return a path with the shown names."""
        return replace(path, segments=tuple(replace(of, model=self.shown[of.model]) for of in path.segments))

    def real(self, path: LayerPath) -> LayerPath:
        """Return a path with the models' own names."""
        return replace(path, segments=tuple(replace(of, model=self._own[of.model]) for of in path.segments))

    def edits(self, text: str) -> str:
        """Return edits in words with the shown names."""
        return " ".join(self.shown.get(word, word) for word in text.split(" "))


def ask(about: PathQuestion, templates: Templates) -> PathPrompt:
    """Return the prompt."""
    schema = _Answer.model_json_schema()
    return PathPrompt(
        Messages(lambda: _messages(about, templates)),
        read=_reader(about),
        schema=schema,
        generation=about.question.generation,
        question=about.question,
        about=about,
    )


def _messages(about: PathQuestion, templates: Templates) -> list[dict[str, str]]:
    def written(detail: Detail) -> list[str]:
        variables = _variables(about, detail)
        return [templates.render(file, **variables) for file in FILES[:2]]

    texts = fitting(map(written, DETAILS), TOKENS)
    return [{"role": role, "content": text} for role, text in zip(("system", "user"), texts, strict=True)]


def _variables(about: PathQuestion, detail: Detail) -> Mapping[str, Any]:
    question, paths = about.question, about.paths
    masks, settings = Masks(about), about.paths.settings
    names, shown = masks.names, masks.shown
    own = {name: question.space.names[model] for name, model in paths.models.items()}
    parents = {trial.candidate.note: trial for trial in question.parents}
    cards, descriptions = ({}, {}) if question.mask_names else (question.cards, question.descriptions)
    tried = sorted((t for t in question.scored if t.candidate.path), key=lambda trial: trial.rank)
    failed = [t for t in question.trials if t.score is None and t.candidate.path]
    strongest = sorted(about.effects, key=lambda effect: -abs(effect[1]) / max(effect[2], 1e-9))[: detail.effects]
    heaviest = sorted(question.tasks, key=lambda task: -abs(question.tasks[task][0]))[: detail.tasks]
    tasks = [task for task in question.tasks if task in heaviest]
    merges = [t for t in question.scored if t.candidate.origin != "parent" and t.candidate.lies_in(question.space)]
    merge = max(merges, key=lambda trial: trial.rank, default=None)
    by_path = {trial.candidate.path: trial for trial in question.trials if trial.candidate.path}

    def scores(trial: Trial) -> str:
        values = [metric_of(question, trial, task) for task in tasks]
        return " ".join("?" if value is None else f"{value:.3f}" for value in values)

    def row(trial: Trial) -> dict[str, Any]:
        path = paths.parse(trial.candidate.path)
        edits = ", ".join(masks.edits(str(edit)) for edit in paths.edits(path, about.root))
        return {
            "id": trial.candidate.id,
            "path": str(masks.hidden(path)),
            "layers": len(path),
            "edits": edits or "none",
            "score": trial.score.total if trial.score else None,
            "tasks": scores(trial) if trial.score else "",
            "reason": names.text(trial.reason, detail.reason),
        }

    def said(path: str, fate: str) -> tuple[str, str]:
        """A proposal and what became of it: `#7`, `predicted 0.600 > 0.550`."""
        trial = by_path.get(path) if fate == "scored" else None
        if trial is None:
            return str(masks.hidden(paths.parse(path))), "it is being scored" if fate == "scored" else fate
        expected = "" if trial.candidate.expected is None else f"{trial.candidate.expected:.3f} > "
        return f"#{trial.candidate.id}", expected + (f"{trial.score.total:.3f}" if trial.score else "failed")

    best = max(question.scored, key=lambda trial: trial.rank, default=None)
    return {
        "q": question,
        "masked": question.mask_names,
        "layers": paths.layers,
        "deepest": paths.deepest,
        "first": paths.first,
        "last": paths.last,
        "edits": settings.edits,
        "kinds": [*settings.kinds],
        "low": settings.gains[0],
        "high": settings.gains[1],
        "root": shown[about.root],
        "others": [shown[name] for name in about.others],
        "models": [
            {
                "name": shown[name],
                "score": score.total if note in parents and (score := parents[note].score) else None,
                "tasks": scores(parents[note]) if note in parents else "",
                "card": names.text(cards.get(note, ""), detail.card) if place < detail.cards else "",
            }
            for place, (name, note) in enumerate(own.items())
        ],
        "merge": shown[MERGE],
        "merge_score": merge.score.total if merge and merge.score else None,
        "merge_tasks": scores(merge) if merge else "",
        "single": question.is_one_metric,
        "hidden_tasks": len(question.tasks) - len(tasks),
        "tasks": [
            {
                "name": names.tasks[task],
                "factor": question.tasks[task][0],
                "weight": question.weights.get(task, 0.0),
                "description": names.text(descriptions.get(task, ""), detail.reason),
            }
            for task in tasks
        ],
        "constraints": [names.text(text, max(detail.reason, 60)) for text in question.constraints],
        "rows": [row(trial) for trial in tried[-detail.rows :]],
        "left_out": max(0, len(tried) - detail.rows),
        "failed": [row(trial) for trial in failed[-detail.failed or len(failed) :]],
        "effects": [(masks.edits(edit), mean, deviation) for edit, mean, deviation in strongest],
        "numeric": [str(masks.hidden(paths.parse(text))) for text in about.numeric],
        "proposed": [said(path, fate) for path, fate in about.proposed[-detail.proposed or len(about.proposed) :]],
        "analysis": names.text(about.analysis, ANALYSIS),
        "best": best.score.total if best and best.score else None,
        "violated": best is not None and best.violation > 0,
        "weights": question.weights,
        "left": max(0, question.budget - question.used),
    }


def _reader(about: PathQuestion) -> Callable[[str], Reading]:
    return lambda text: read(text, about)


def read(text: str, about: PathQuestion) -> Reading:
    """Read an answer: every path is checked by itself, and one that cannot be used costs only itself."""
    found = objects(text)
    answers = [each for each in found if "paths" in each]
    loose = [each for each in found if "path" in each]
    if not answers and not loose:
        return Reading(problems=["the answer holds no JSON object with paths"])
    given: Any = answers[-1]["paths"] if answers else loose
    problems, proposals = list[str](), list[Suggestion]()
    masks = Masks(about)
    for place, entry in enumerate(given if isinstance(given, list) else [given], 1):
        if place > MOST:
            problems.append(f"took the first {MOST} of {len(given)} paths")
            break
        said: dict[str, Any] = entry if isinstance(entry, dict) else {"path": entry}
        try:
            path = _path(said.get("path"), about, masks)
        except (RecipeError, ValueError) as error:
            problems.append(f"dropped path {place}: {masks.names.text(str(error).removeprefix('path: '), 240)}")
            continue
        if any(one.path == str(path) for one in proposals):
            problems.append(f"dropped path {place}: it repeats one before it")
            continue
        predicted = None
        if said.get("predicted_score") is not None:
            try:
                predicted = predicted_by(about.question, said["predicted_score"])
            except ValueError as error:
                problems.append(f"dropped a predicted score: {error}")
        reason = without_surrogates(str(said.get("reason") or ""))[:200]
        proposals.append(Suggestion({}, "llm", reason, expected=predicted, path=str(path)))
    analysis = without_surrogates(str(answers[-1].get("analysis") or ""))[:ANALYSIS] if answers else ""
    return Reading(proposals[: about.question.wanted], analysis, problems, text=text)


def _path(said: Any, about: PathQuestion, masks: Masks) -> LayerPath:
    """Return a path of an answer, with the models' own names. Raises ValueError or RecipeError where it is none."""
    if not isinstance(said, str) or not said.strip():
        raise ValueError("it has no text; write segments such as `A 0-12 | B 12-18`")
    layers = {masks.shown[name]: about.paths.layers for name in (about.root, *about.others)}
    path = masks.real(LayerPath.parse(said[:TEXT], Limits(layers)))
    about.paths.check(path)
    about.paths.check_edits(path)
    return path
