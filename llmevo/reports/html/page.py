"""The page of a run, and the rendering of every page: one file that loads nothing else, whatever texts it shows.

Templates escape every value, data is embedded as JSON without angle brackets or gzipped, and a content
security policy lets no other script run and no request out.
"""

import base64
import gzip
import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup
from plotly.offline import get_plotlyjs  # pyright: ignore[reportMissingTypeStubs]

from llmevo.errors import plural, quoted, without_passwords
from llmevo.evaluation.score import metric_of
from llmevo.reports.conclusion import conclusion
from llmevo.reports.html import figures
from llmevo.reports.html.analysis import Subject, corrected, costs, effects, items, layers_of
from llmevo.reports.html.llm_analyses import analyses
from llmevo.reports.html.pareto import covered, front, names, places
from llmevo.reports.html.predictions import LLM, STATISTICS, Prediction, predictions, rank_correlation
from llmevo.reports.quantized_scores import finalists
from llmevo.reports.text import UNSAFE, clock, printable, size
from llmevo.run.spending import Spending
from llmevo.search.prompts.names import Names
from llmevo.search.prompts.table import GeneTable
from llmevo.search.prompts.variables import method_lines


@dataclass(frozen=True)
class Live:
    """What makes a page follow its log; see `llmevo.reports.web`."""

    version: str
    """Of the log that the page was made from."""
    now: Markup
    """HTML above the report: what happens now."""
    root: str = "./"
    """The address of what is served, from this page: the list of runs, or the only run."""


def rows(subject: Subject, found: list[Prediction]) -> list[dict[str, Any]]:
    """Return the candidates in the order of evaluation; those without a result yet come last."""
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
                "origin": figures.shown_origin(candidate.origin),
                "note": "; ".join(filter(None, (candidate.note, trial.reason if trial and trial.violation else ""))),
                "score": _rounded(score.total) if score else None,
                "stderr": _rounded(score.stderr) if score else None,
                "tasks": [
                    _rounded(metric_of(score.tasks, name, metric)[0]) if score else None
                    for name, (_, metric) in subject.config.counted.items()
                ],
                "predicted": _rounded(predicted.get(candidate.id)),
                "seconds": round(sum(trial.seconds.values()), 1) if trial else None,
                "reason": "" if score else trial.reason if trial else "not scored yet",
                "best": bool(best and best.candidate.id == candidate.id),
            }
        )
    return listed


def _rounded(value: float | None, digits: int = 6) -> float | None:
    return None if value is None else float(f"{value:.{digits}g}")


def run_page(folder: Path) -> str:
    """Return the report of one run, finished or not. Raises RunError for a folder without a run."""
    return report(Subject.of(folder))


def report(subject: Subject, live: Live | None = None) -> str:
    """Return the report of a run as its log is now; with `live` it follows the log."""
    space, question = subject.space, subject.question()
    predicted, by_task, by_item = predictions(subject), effects(subject), items(subject)
    drawn = {
        "search": figures.search(subject),
        "step": figures.step_size(subject),
        "trust": figures.trust(subject),
        "calibration": figures.calibration(predicted),
        "recipe": figures.recipe(subject),
        "routing": figures.routing(subject),
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
                layers_of(g.gene),
                g.gene.model or "all models",
                g.gene.parameter,
                *(_rounded(value, 4) for value in (g.best, g.lowest, g.highest, g.effect, g.stderr, g.strength)),
                *(_rounded(value, 4) for value in (g.earned, g.earned_stderr)),
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
        "items": [
            {
                kind: [[i.question, i.answer, i.best_reply, i.rival_reply, i.best, i.rival] for i in found]
                for kind, found in (("gained", of.gained), ("lost", of.lost))
            }
            for of in by_item
        ],
    }
    return render(
        "run.html.j2",
        data,
        details,
        s=subject,
        state=subject.state,
        live=live,
        name=subject.folder.resolve().name,
        spending=Spending(subject.config.search.budget, subject.state),
        conclusion=conclusion(subject.state, subject.folder),
        heldout=[
            {
                "row": event.row,
                "kind": event.kind,
                "score": event.score,
                "stderr": event.stderr,
                "tasks": [metric_of(event.tasks, task, of.metric) for task, (_, of) in subject.heldout_tasks.items()],
            }
            for event in subject.state.heldout.values()
        ],
        served=finalists(subject.state),
        kept=subject.state.heldout_kept,
        front=places(subject),
        objectives=names(subject),
        covered=covered(subject),
        corrected=corrected(subject),
        effects=by_task,
        analyses=analyses(subject),
        methods=method_lines(question, GeneTable(space, tuple(space.slices)), Names(space, question.tasks)),
        layers_of=layers_of,
        predicted=[
            (by, sum(p.by == by for p in predicted), rank_correlation(predicted, by)) for by in (LLM, STATISTICS)
        ],
        failed=[row for row in listed if row["score"] is None],
        items=by_item,
        costs=costs(subject),
        config=without_passwords(yaml.safe_dump(subject.started.config, sort_keys=False, width=100)),
    )


def render(
    template: str, data: dict[str, Any], details: dict[str, Any], live: Live | None = None, **values: Any
) -> str:
    """Return a whole page. It reads `data` at once, and `details` when something is opened."""
    scripts = [source("page.js"), *([source("live.js")] if live else [])]
    page = _template(template).render(
        live=live,
        scripts=[Markup(script) for script in scripts],
        style=Markup(source("page.css")),
        policy=policy(bool(live)),
        plotly=base64.b64encode(plotly()).decode() if data.get("figures") and not live else "",
        data=printable(data),
        details=base64.b64encode(_packed(json.dumps(printable(details)))).decode(),
        **values,
    )
    return UNSAFE.sub("", page)


def fragment(template: str, **values: Any) -> Markup:
    """Return a part of a page; the template escapes the values."""
    return Markup(UNSAFE.sub("", _template(template).render(**values)))


@cache
def policy(live: bool = False) -> str:
    """The content security policy of every page. A live one may ask its own server for what is new, and has forms."""
    own = [source("page.js"), get_plotlyjs(), *([source("live.js")] if live else [])]
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in own]
    rules = {
        "default-src": "'none'",
        "script-src": " ".join(f"'sha256-{digest}'" for digest in digests),
        "style-src": "'unsafe-inline'",
        "img-src": "data: blob:",
        **({"connect-src": "'self'"} if live else {}),
        "base-uri": "'none'",
        "form-action": "'self'" if live else "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("llmevo.reports.html"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: Any = {"number": number, "clock": clock, "plural": plural, "origin": figures.shown_origin}
    environment.filters |= filters
    environment.filters |= {"breakable": breakable, "quoted": quoted, "size": size}
    return environment


def _template(name: str) -> jinja2.Template:
    """Return a template, compiled once."""
    return _environment().get_template(name)


@cache
def source(name: str) -> str:
    """Return a file beside the templates as it is."""
    environment = _environment()
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def number(value: float | None, sign: bool = False) -> str:
    """Return a score in a few digits."""
    if value is None:
        return ""
    return f"{value:{'+' if sign else ''}{'.3f' if abs(value) < 100 else '.4g'}}"


def breakable(text: str) -> str:
    """Return a name that a line may break after its underscores."""
    return text.replace("_", "_\u200b")


def _packed(text: str) -> bytes:
    return gzip.compress(text.encode(), mtime=0)


@cache
def plotly() -> bytes:
    """Return Plotly's own JavaScript, which gzip reduces to less than a third."""
    return _packed(get_plotlyjs())
