"""A run's best as a model of its own, or as a recipe to share, with a model card."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from huggingface_hub import ModelCardData

from llmevo.errors import RunError, plural
from llmevo.export.pack import SharedRun, write_pack
from llmevo.merging.merger import MASKS, masks_of
from llmevo.merging.recipe import Provenance, Recipe
from llmevo.merging.writer import write_model
from llmevo.models.checkpoints import Sources
from llmevo.run.log import events
from llmevo.run.log.state import RunState
from llmevo.search.trial import Trial

HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w.-]+)?$")


MADE_AGAIN = "`llmevo merge best.yml MODEL` makes this model again, bit for bit; mergekit reads the recipe as well."


@dataclass(frozen=True)
class Export:
    """A candidate of a run, with all that is written of it."""

    candidate: int
    recipe: Recipe
    """As it was merged."""
    texts: Mapping[str, str]
    """Recipe, card and masks, fit for others."""
    shared: SharedRun

    @classmethod
    def of(
        cls,
        recorded: Sequence[events.Event],
        sources: Sources,
        root: Path,
        candidate: int | None = None,
        changed: Sequence[events.Change] = (),
    ) -> Self:
        """The best, or one by its id. Reads no weights; what the models are called only for random masks. `changed`:
        what the card has to say of models that are not those of the run.

        Raises RunError when there is none.
        """
        state = RunState.fold(iter(recorded))
        started = state.started
        if started is None or not state.trials:
            raise RunError("the run has scored no candidate yet; go on with `llmevo resume`")
        best = state.best.candidate.id if state.best else None
        chosen = best if candidate is None else candidate
        if chosen is None:
            raise RunError("every candidate of the run has failed; choose one with --candidate all the same")
        if chosen not in state.trials:
            raise RunError(
                f"--candidate {candidate}: the run has no such candidate; its ids are 0 to {max(state.trials)}"
            )
        recipe, shared = Recipe.model_validate(state.recipes[chosen]), SharedRun(recorded, root)
        masks = masks_of(recipe, sources, started.masks)
        others = Recipe.model_validate(shared.state.recipes[chosen])
        texts = {
            "best.yml": Provenance(started.masks, MASKS if masks else None).sign(others),
            "README.md": model_card(shared, others, chosen, changed),
        }
        return cls(chosen, recipe, {**texts, **({MASKS: masks} if masks else {})}, shared)

    def write(self, sources: Sources, out: Path) -> None:
        """The merged model as a Hugging Face folder. Raises what `write_model` raises."""
        started = self.shared.state.started
        assert started is not None
        # What was scored has all rows of the embeddings.
        recipe = {"mergekit_config.yml": self.texts["best.yml"]}
        write_model(self.recipe, sources, out, started.masks, {**self.texts, **recipe}, trim=False)

    def write_recipe(self, out: Path) -> None:
        """The recipe and how it was found: what anyone with the models makes the same model of.

        Raises UserError when `out` holds something.
        """
        write_pack(self.shared, self.texts, out)


def model_card(shared: SharedRun, recipe: Recipe, candidate: int, changed: Sequence[events.Change] = ()) -> str:
    """What the model is made of, how well it does and how to make it again, for README.md. `changed`: see `Export`."""
    state = shared.state
    started = state.started
    assert started is not None
    trial = state.trials[candidate]
    licences = {source["licence"] for source in started.sources}
    parents = [str(of) for of in recipe.references if HUB_ID.match(str(of)) and str(of) not in shared.local]
    data = ModelCardData(
        library_name="transformers",
        tags=["merge", "llmevo", "mergekit"],
        license=licences.pop() if len(licences) == 1 else None,  # one that is not known is none of the others
        base_model=parents or None,
    )
    lines = [
        "---",
        data.to_yaml(),
        "---",
        "# A merge found by llmevo",
        "",
        f"Candidate {candidate} of {len(state.trials)}, merged by `{recipe.merge_method}`; it came from"
        f" `{trial.candidate.origin}`. {_found(state, trial)}",
        *_aims(state, trial),
        *_changed(shared, changed),
        "",
        "## Models",
        "",
        "| model | revision | licence |",
        "|---|---|---|",
        *(f"| `{s['reference']}` | {s['revision'] or ''} | {s['licence'] or 'unknown'} |" for s in started.sources),
        "",
        *_local(shared.local),
        *_heldout_table(state, candidate),
        "## Recipe",
        "",
        "```yaml",
        recipe.to_yaml().rstrip(),
        "```",
        "",
        MADE_AGAIN if not changed else "mergekit reads the recipe as well.",
        "",
        f"Seed {started.seed}; " + ", ".join(f"{name} {number}" for name, number in started.versions.items()) + ".",
        "",
    ]
    return "\n".join(lines)


def _changed(shared: SharedRun, changed: Sequence[events.Change]) -> list[str]:
    """That the scores are those of other weights."""
    models = dict.fromkeys(change.key.removeprefix("sources.").rpartition(".")[0] for change in changed)
    if not models:
        return []
    named = ", ".join(f"`{shared.names.get(model, model)}`" for model in models)
    return [
        "",
        f"**These are not the weights that were scored:** {named} had changed since the run when this was exported.",
    ]


def _found(state: RunState, trial: Trial) -> str:
    """What it scored in the search, in all and at every task."""
    if trial.score is None:
        return f"It has no score, for it failed: {trial.reason}."
    values = {task: state.aims.value(trial.score.tasks, task) for task in state.aims.tasks}
    each = ", ".join(f"{task} {value:.3f}" for task, value in values.items() if value is not None)
    return f"Search score {_score(trial.value, trial.score.stderr)}{f' ({each})' if len(values) > 1 else ''}."


def _aims(state: RunState, trial: Trial) -> list[str]:
    """Whether it keeps the constraints, and where it stands where every task is an aim of its own."""
    lines: list[str] = []
    if texts := ", ".join(f"`{constraint.text}`" for constraint in state.aims.constraints):
        lines.append(f"Of the constraints {texts} it {trial.reason or 'violates none'} on the search questions.")
    if trial in state.front:
        tasks = ", ".join(state.aims.tasks)
        lines.append(f"It is one of {plural(len(state.front), 'candidate')} on the Pareto front of {tasks}.")
    return lines


def _local(references: Sequence[str]) -> list[str]:
    """What whoever wants to merge the recipe has to replace."""
    if not references:
        return []
    listed = ", ".join(f"`{reference}`" for reference in references)
    return [
        f"Only whoever made this has {listed}. To merge the recipe, put these models there, or replace the references"
        " in `best.yml` by folders of yours or hub ids of the same models.",
        "",
    ]


def _heldout_table(state: RunState, candidate: int) -> Sequence[str]:
    rows: list[Any] = [*state.heldout.values()]
    if not rows:
        return []
    tasks = [*rows[0].tasks]
    metrics = {task.name: task.metric for task in state.heldout_tasks}
    header = ["model", "score", *tasks]
    table = [header, ["---"] * len(header)]
    for row in rows:
        values = [f"{row.tasks[task][metrics.get(task, 'acc,none')]:.3f}" for task in tasks]
        table.append([f"{row.row}", _score(row.score, row.stderr), *values])
    note = "Questions that no choice was made by; ± is one standard error."
    own = [row.row for row in rows if row.candidate == candidate]
    if "best" not in own:
        which = f"This model is `{own[0]}`" if own else "This model was not asked them"
        note += f" {which}; `best` is candidate {state.heldout['best'].candidate}." if "best" in state.heldout else ""
    kept = [f"- {each}" for each in state.heldout_kept if "best" in own]  # they are of the best
    lines = ["| " + " | ".join(line) + " |" for line in table]
    return ["## Held-out score", "", note, "", *lines, "", *([*kept, ""] if kept else [])]


def _score(value: float, stderr: float) -> str:
    return f"{value:.3f} ± {stderr:.3f}"
