"""What the templates for chat models may use: everything there is to say, as plain values with names.

`Detail` says how much of it there is.
"""

from statistics import fmean
from typing import Any

from llmevo.prompting.budget import Detail
from llmevo.prompting.evidence import Evidence, calibration, target
from llmevo.prompting.facts import effect_lines, geometry_lines, method_lines, where
from llmevo.prompting.names import Names
from llmevo.prompting.question import Question
from llmevo.prompting.rows import REASON, failed_trials, model_rows, plain_row, shown_trials, trial_row
from llmevo.prompting.sheet import Sheet, scale

LAST = 6
"""Earlier predictions that are listed."""


def variables(question: Question, sheet: Sheet, evidence: Evidence, detail: Detail) -> dict[str, Any]:
    """Everything by name."""
    space = question.space
    names = Names(space, question.tasks, question.mask_names, detail.names)
    tasks = sorted(question.tasks, key=lambda task: -abs(question.tasks[task][0]))[: detail.tasks]
    tasks = [task for task in question.tasks if task in tasks]  # in the order of the config
    filters = len(space.filters) > 1
    best = max(question.inside, key=lambda trial: trial.value, default=None)
    by_parameter = {gene.parameter: gene for gene in sheet.numbers}
    return {
        "q": question,
        "masked": question.mask_names,
        "method": " or ".join(names.methods[method.name] for method in space.genome.methods),
        "methods": [
            (names.methods[m.name], [names.parameters[p] for p in space.parameters_of(m)]) for m in space.genome.methods
        ],
        "parameters": [
            (names.parameters[p], round(g.low * scale(g)), round(g.high * scale(g)), scale(g), p)
            for p, g in by_parameter.items()
        ],
        "tasks": [(names.tasks[task], *question.tasks[task]) for task in tasks],
        "hidden_tasks": len(question.tasks) - len(tasks),
        "constraints": [names.text(text, REASON) for text in question.constraints],
        "weights": [question.weights.get(task, 0.0) for task in tasks] if question.weights else [],
        "models": model_rows(question, names, tasks, detail),
        "columns": [names.column(gene, filters) for gene in sheet.columns],
        "slices": [names.slices[label] for label in sheet.slices],
        "hidden_slices": len(space.slices) - len(sheet.slices),
        "geometry": geometry_lines(question, sheet, names, detail),
        "rows": [trial_row(trial, question, sheet, names, tasks) for trial in shown_trials(question, detail)],
        "failed": [
            trial_row(trial, question, sheet, names, tasks, detail) for trial in failed_trials(question, detail)
        ],
        "suggestions": [
            plain_row(f"S{place}", genes, sheet, names, score, stderr)
            for place, (genes, score, stderr) in enumerate(question.suggestions[: detail.suggestions], start=1)
        ],
        "effects": effect_lines(question, sheet, evidence, names, filters, detail),
        "scored": len(question.inside),
        "interactions": [
            (where(i.first, sheet, names, filters), where(i.second, sheet, names, filters), i.strength)
            for i in evidence.interactions
            if i.first in sheet.numbers and i.second in sheet.numbers
        ][: detail.interactions],
        "choices": method_lines(question, sheet, names),
        "predictions": question.predictions[-LAST:],
        "spearman": calibration(question.predictions),
        "bias": fmean(a - b for a, b in question.predictions) if question.predictions else 0.0,
        "predicted": len(question.predictions),
        "noise": fmean(t.score.stderr for t in question.scored if t.score) if question.scored else 0.0,
        "questions": best.score.items if best and best.score else 0,
        "best": best.value if best else None,
        "stagnation": len(question.trials) - 1 - [*question.trials].index(best) if best else 0,
        "target": target(question),
    }
