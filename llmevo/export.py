"""A run's best as a model of its own, with its recipe and a model card."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from llmevo.errors import RunError
from llmevo.recipe import Recipe
from llmevo.runlog import RunState
from llmevo.sources import Sources
from llmevo.writing import write_model

HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w.-]+)?$")


def export_run(state: RunState, sources: Sources, out: Path, candidate: int | None = None) -> Recipe:
    """Export a run's best, or one of its candidates, with its recipe and a model card."""
    started = state.started
    if started is None or not state.trials:
        raise RunError("the run has scored no candidate yet; go on with `llmevo resume`")
    best = state.best.candidate.id if state.best else None
    chosen = best if candidate is None else candidate
    if chosen not in state.recipes:
        raise RunError(f"--candidate {candidate}: the run has no such candidate; its ids are 0 to {max(state.recipes)}")
    recipe = Recipe.model_validate(state.recipes[chosen])
    extra = {"best.yml": recipe.to_yaml(), "README.md": model_card(state, recipe, chosen)}
    # What was scored has all rows of the embeddings.
    write_model(recipe, sources, out, started.masks, extra, trim=False)
    return recipe


def model_card(state: RunState, recipe: Recipe, candidate: int) -> str:
    """What the model is made of and how well it does, for the model's README.md."""
    started = state.started
    assert started is not None
    trial = state.trials[candidate]
    licences = sorted({source["licence"] for source in started.sources if source["licence"]})
    parents = [str(reference) for reference in recipe.references]
    data = ModelCardData(
        library_name="transformers",
        tags=["merge", "llmevo", "mergekit"],
        license=licences[0] if len(licences) == 1 else None,
        base_model=[parent for parent in parents if HUB_ID.match(parent)] or None,
    )
    lines = [
        "---",
        data.to_yaml(),
        "---",
        "# A merge found by llmevo",
        "",
        f"Candidate {candidate} of {len(state.trials)}, merged by `{recipe.merge_method}`; it came from"
        f" `{trial.candidate.origin}`. Search score {_score(trial.value, trial.score.stderr if trial.score else 0)}.",
        "",
        "## Models",
        "",
        "| model | revision | licence |",
        "|---|---|---|",
        *(f"| `{s['reference']}` | {s['revision'] or ''} | {s['licence'] or 'unknown'} |" for s in started.sources),
        "",
        *_heldout_table(state),
        "## Recipe",
        "",
        "```yaml",
        recipe.to_yaml().rstrip(),
        "```",
        "",
        f"Seed {started.seed}; " + ", ".join(f"{name} {number}" for name, number in started.versions.items()) + ".",
        "",
    ]
    return "\n".join(lines)


def _heldout_table(state: RunState) -> Sequence[str]:
    rows: list[Any] = [*state.heldout.values()]
    if not rows:
        return []
    tasks = [*rows[0].tasks]
    config = state.started.config if state.started else {}
    metrics = {
        task["name"]: task.get("metric", "acc,none") for task in config.get("heldout", []) if isinstance(task, dict)
    }
    header = ["model", "score", *tasks]
    table = [header, ["---"] * len(header)]
    for row in rows:
        values = [f"{row.tasks[task][metrics.get(task, 'acc,none')]:.3f}" for task in tasks]
        table.append([f"{row.row}", _score(row.score, row.stderr), *values])
    note = "Questions that no choice was made by; ± is one standard error."
    return ["## Held-out score", "", note, "", *("| " + " | ".join(line) + " |" for line in table), ""]


def _score(value: float, stderr: float) -> str:
    return f"{value:.3f} ± {stderr:.3f}"
