"""Every candidate as the page's table has it: a light row each; recipes are written out when one is opened."""

from typing import Any

from llmevo.report.figures import origin
from llmevo.report.predictions import Prediction
from llmevo.report.subject import Subject, metric_of


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
