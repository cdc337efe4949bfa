"""The page itself: everything in one file that asks for nothing else, whatever texts it shows.

Templates escape what they print, data lies in the page as JSON without angle brackets or gzipped, and a content
security policy lets no other script run and no request out.
"""

import base64
import gzip
import hashlib
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup
from plotly.offline import get_plotlyjs  # pyright: ignore[reportMissingTypeStubs]

from llmevo.errors import plural
from llmevo.reports.html import figures
from llmevo.reports.html.costs import costs
from llmevo.reports.html.effects import effects, place
from llmevo.reports.html.figures import origin
from llmevo.reports.html.pareto import covered, front, places
from llmevo.reports.html.predictions import LLM, STATISTICS, Prediction, predictions, rank_correlation
from llmevo.reports.html.questions import TaskItems, items
from llmevo.reports.html.subject import Subject, metric_of
from llmevo.reports.html.winners_curse import Corrected, rechoose, shrink
from llmevo.reports.terminal.panel import clock
from llmevo.reports.verdict import verdict
from llmevo.search.prompts.chat import method_lines
from llmevo.search.prompts.names import Names
from llmevo.search.prompts.table import GeneTable
from llmevo.search.trial import START_ROWS


def rows(subject: Subject, found: list[Prediction]) -> list[dict[str, Any]]:
    """In the order of evaluation; candidates without a result yet come last."""
    predicted = {prediction.candidate: prediction.predicted for prediction in found}
    best = subject.state.best
    listed: list[dict[str, Any]] = []
    for candidate in subject.state.candidates.values():
        trial = subject.state.trials.get(candidate.id)
        score = trial.score if trial else None
        listed.append(
            {
                "id": candidate.id,
                "generation": candidate.generation,
                "origin": origin(candidate.origin),
                "note": "; ".join(filter(None, (candidate.note, trial.reason if trial and trial.violation else ""))),
                "score": _short(score.total) if score else None,
                "stderr": _short(score.stderr) if score else None,
                "tasks": [
                    _short(metric_of(score.tasks, name, metric)[0]) if score else None
                    for name, (_, metric) in subject.config.counted.items()
                ],
                "predicted": _short(predicted.get(candidate.id)),
                "seconds": round(sum(trial.seconds.values()), 1) if trial else None,
                "reason": "" if score else trial.reason if trial else "not scored yet",
                "best": bool(best and best.candidate.id == candidate.id),
            }
        )
    return listed


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


REPORT = "report.html"
"""What the page is called in a run's folder."""


def run_page(folder: Path) -> str:
    """The report of one run, finished or not. Raises RunError for a folder without a run."""
    subject = Subject.of(folder)
    predicted, by_task, by_item = predictions(subject), effects(subject), items(subject)
    drawn = {
        "search": figures.search(subject),
        "step": figures.step_size(subject),
        "trust": figures.trust(subject),
        "calibration": figures.calibration(predicted),
        "recipe": figures.recipe(subject),
        "front": front(subject),
        **{f"effect-{number}": figures.effect(subject, of) for number, of in enumerate(by_task)},
    }
    listed = rows(subject, predicted)
    data = {
        "figures": {name: figure for name, figure in drawn.items() if figure},
        "tasks": [*subject.tasks.values()],
        "candidates": listed,
        "effects": [
            [
                of.task,
                place(g.gene),
                g.gene.model or "all models",
                g.gene.parameter,
                *map(_four, (g.best, g.lowest, g.highest, g.effect, g.stderr, g.strength, g.earned, g.earned_stderr)),
            ]
            for of in by_task
            for g in of.genes
        ],
    }
    details = {
        "recipes": subject.state.recipes,
        "prompts": [
            {"messages": event.messages, "reply": event.reply, "analysis": event.analysis, "problems": event.problems}
            for event in subject.state.prompted
        ],
        "items": [_listed(of) for of in by_item],
    }
    return render(
        "run.html.j2",
        data,
        details,
        s=subject,
        state=subject.state,
        name=folder.resolve().name,
        verdict=verdict(subject.state, subject.folder) if "best" in subject.state.heldout else [],
        heldout=heldout_table(subject),
        kept=subject.state.heldout_kept,
        front=places(subject),
        covered=covered(subject),
        corrected=corrected(subject),
        rechosen=rechosen(subject),
        effects=by_task,
        methods=_methods(subject),
        place=place,
        predicted=[
            (by, sum(p.by == by for p in predicted), rank_correlation(predicted, by)) for by in (LLM, STATISTICS)
        ],
        failed=[row for row in listed if row["score"] is None],
        items=by_item,
        costs=costs(subject),
        config=yaml.safe_dump(subject.started.config, sort_keys=False, width=100),
    )


def heldout_table(subject: Subject) -> list[dict[str, Any]]:
    """Base, parents, uniform merge, best coefficient and best, with the score and standard error of every task."""
    return [
        {
            "row": event.row,
            "kind": event.kind,
            "score": event.score,
            "stderr": event.stderr,
            "tasks": [metric_of(event.tasks, name, task.metric) for name, (_, task) in subject.heldout_tasks.items()],
        }
        for event in subject.state.heldout.values()
    ]


def corrected(subject: Subject) -> Corrected | None:
    """The best search score without its luck, learnt from what the search itself has drawn."""
    best, trials = subject.state.best, subject.scored
    if best is None:
        return None
    if best.candidate.origin not in START_ROWS:  # those were not drawn, and are no guide to what was
        trials = [trial for trial in trials if trial.candidate.origin not in START_ROWS]
    scores = [trial.score for trial in trials if trial.score]
    at = next(number for number, trial in enumerate(trials) if trial.candidate.id == best.candidate.id)
    return shrink([score.total for score in scores], [score.stderr for score in scores], at)


def rechosen(subject: Subject) -> Corrected | None:
    """The same from the questions' own scores; None where the log has them not for all that counts."""
    counted = subject.config.counted
    scores = [trial.score for trial in subject.scored if trial.score]
    tables = [[score.item_scores.get(name, []) for name in counted] for score in scores]
    sizes = {tuple(map(len, table)) for table in tables}
    if len(sizes) != 1 or not all(next(iter(sizes))):
        return None
    found = rechoose(tables, [weight for weight, _ in counted.values()])
    # A task whose metric is no mean over questions would be weighed wrongly.
    best = subject.state.best
    return found if found and best and math.isclose(found.score, best.value, abs_tol=1e-3) else None


def _methods(subject: Subject) -> list[tuple[str, str]]:
    """How each merge method has done, where there are several."""
    question = subject.question()
    return method_lines(
        question, GeneTable(subject.space, tuple(subject.space.slices)), Names(subject.space, question.tasks)
    )


def _listed(of: TaskItems) -> dict[str, Any]:
    return {
        kind: [[i.question, i.answer, i.best_reply, i.rival_reply, i.best, i.rival] for i in found]
        for kind, found in (("gained", of.gained), ("lost", of.lost))
    }


def _four(value: float) -> float:
    return float(f"{value:.4g}")


def render(template: str, data: dict[str, Any], details: dict[str, Any], **values: Any) -> str:
    """A whole page. `data` is read at once, `details` when something is opened."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("llmevo.reports.html"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: Any = {"number": number, "clock": clock, "plural": plural, "origin": figures.origin}
    environment.filters |= filters
    environment.filters["breakable"] = breakable
    script, style = (_file(environment, name) for name in ("page.js", "page.css"))
    return environment.get_template(template).render(
        script=script,
        style=style,
        allowed=" ".join(f"'sha256-{_digest(text)}'" for text in (script, get_plotlyjs())),
        plotly=_plotly(),
        data=data,
        details=_packed(json.dumps(details).encode()),
        **values,
    )


def number(value: float | None, sign: bool = False) -> str:
    """A score as people read it."""
    if value is None:
        return ""
    return f"{value:{'+' if sign else ''}{'.3f' if abs(value) < 100 else '.4g'}}"


def breakable(text: str) -> str:
    """A name that may go on in the next line after its underscores."""
    return text.replace("_", "_\u200b")


def _file(environment: jinja2.Environment, name: str) -> Markup:
    """One of our own files, as it is."""
    assert environment.loader is not None
    return Markup(environment.loader.get_source(environment, name)[0])


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _packed(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, mtime=0)).decode()


@cache
def _plotly() -> str:
    """Plotly's own JavaScript, of which gzip leaves less than a third."""
    return _packed(get_plotlyjs().encode())
