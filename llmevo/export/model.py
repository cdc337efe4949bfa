"""A run's best as a model of its own, or as a recipe to share, with a model card."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from huggingface_hub import EvalResult

from llmevo.errors import RunError, plural
from llmevo.export.cards import Metadata, Parent, Relation, models_table, pipeline, recipe_lines, results_of
from llmevo.export.formats import Format, Written
from llmevo.export.lora import base_of
from llmevo.export.pack import SharedRun, portable, write_pack
from llmevo.merging.merger import MASKS_FILE, masks_of
from llmevo.merging.mixture.mixture import ROUTER
from llmevo.merging.preparation.texts import read_texts
from llmevo.merging.provenance import Provenance
from llmevo.merging.recipe import QUESTIONS, Recipe
from llmevo.models.references import ModelReference
from llmevo.models.sources import Sources
from llmevo.run.experiment import Experiment
from llmevo.run.log import events
from llmevo.run.log.state import RunState
from llmevo.search.trial import Trial


@dataclass(frozen=True)
class Export:
    """A candidate of a run and the files to write about it."""

    candidate: int
    recipe: Recipe
    """With the references of this machine."""
    texts: Mapping[str, str]
    """{name: text} of the published recipe, card and masks."""
    shared: SharedRun
    published: Recipe
    """With the references that are published."""
    provenance: Provenance
    questions: Path
    """The file of the run's search questions, where a preparation reads them."""
    changed: Sequence[events.Change] = ()
    """The models that differ from those of the run."""
    localized: Callable[[Recipe], Recipe] = field(default=lambda recipe: recipe)
    """See `Scorer.localized`."""
    loads_tasks: bool = False
    """Whether to merge it loads the run's tasks, whose questions or router the run's folder lacks."""

    @classmethod
    def of(
        cls,
        run: Path,
        recorded: Sequence[events.Event],
        experiment: Experiment,
        candidate: int | None = None,
        changed: Sequence[events.Change] = (),
    ) -> Self:
        """The export of one candidate by its id, by default of the best.

        Reads no weights, and the names of tensors only for random masks. `changed` are the models that differ from
        those of the run, for the card. Raises RunError if there is no such candidate, or if its recipe names other
        models than the run's.
        """
        state = RunState.fold(iter(recorded))
        started = state.started
        if started is None or not state.trials:
            raise RunError("the run has scored no candidate yet; continue it with `llmevo resume`")
        best = state.best.candidate.id if state.best else None
        chosen = best if candidate is None else candidate
        if chosen is None:
            raise RunError("every candidate of the run has failed; choose one with --candidate")
        if chosen not in state.trials:
            raise RunError(
                f"--candidate {candidate}: the run has no such candidate; its ids are 0 to {max(state.trials)}"
            )
        recipe, shared = Recipe.model_validate(state.recipes[chosen]), SharedRun(recorded, experiment.root)
        known = [source["reference"] for source in started.sources]
        if foreign := [reference for reference in map(str, recipe.references) if reference not in known]:
            raise RunError(
                f"{run}: the recipe of candidate {chosen} names {foreign[0]}, which is not a model of the run"
                f" ({', '.join(known)}); its log has been changed by hand"
            )
        router = (
            str(file.absolute()) if (file := run / ROUTER).is_file() else ""
        )  # as it was, though caches are emptied
        routed = recipe.mixture and recipe.mixture.router == ROUTER
        questions = (run / QUESTIONS).resolve()
        asks_questions, has_questions = recipe.prepare and recipe.prepare.text == QUESTIONS, questions.is_file()

        def as_it_was(recipe: Recipe) -> Recipe:
            """The recipe with the router and the texts that lie beside the log."""
            if router:
                recipe = recipe.with_router(router)
            if asks_questions and has_questions:
                recipe = recipe.with_text(read_texts(str(questions), run, QUESTIONS).keep())
            return recipe

        masks = masks_of(recipe, experiment.sources, started.masks)
        published = Recipe.model_validate(shared.state.recipes[chosen])
        provenance = Provenance(started.masks, MASKS_FILE if masks else None, changed=bool(changed))
        texts = {
            "best.yml": provenance.sign(published),
            "README.md": model_card(shared, published, chosen, changed),
        }
        return cls(
            chosen,
            recipe,
            {**texts, **({MASKS_FILE: masks} if masks else {})},
            shared,
            published,
            provenance,
            questions,
            changed,
            lambda recipe: experiment.scorer.localized(as_it_was(recipe)),
            bool(asks_questions and not has_questions) or bool(routed and not router),
        )

    def write(self, sources: Sources, out: Path, format_: Format | None = None, to_share: bool = False) -> Written:
        """Write the merged model, by default as a Hugging Face folder. Raises the errors of `Format.write`.

        Its recipe can be merged where it lies; one `to_share`, or outside of the folder where the run's references
        start, has them as a pack has, without the places of this machine.
        """
        started, root = self.shared.state.started, sources.root.resolve()
        assert started is not None
        stays = not to_share and out.resolve().is_relative_to(root)
        best = self.provenance.sign(self._placed(out.resolve(), root) if stays else self.published)
        format_ = format_ or Format()

        def texts(relation: Relation, facts: str) -> Mapping[str, str]:
            card = model_card(
                *(self.shared, self.published, self.candidate, self.changed, format_, relation, facts),
                base=portable(sources.without_adapter(self.recipe.donor)),
                pipeline_tag=pipeline(sources.config(self.recipe.donor)),
            )
            return {**self.texts, "README.md": card, "best.yml": best, "mergekit_config.yml": best}

        # The scored model has all rows of the embeddings, so none are trimmed.
        recipe = self.localized(self.recipe)
        return format_.write(recipe, sources, out, started.masks, texts, trim=False, to_share=to_share)

    def _placed(self, out: Path, root: Path) -> Recipe:
        """The recipe as a file in the folder `out`, with the run's search questions where a preparation reads them."""
        placed = self.published.seen_from(out, root)
        if placed.prepare and placed.prepare.text == QUESTIONS:
            return placed.with_text(os.path.relpath(self.questions, out))
        return placed

    def write_recipe(self, out: Path) -> None:
        """Write the recipe and the run's log: enough to make the same model, for those with its sources.

        Raises UserError when `out` exists and is not empty.
        """
        localized = self.localized(self.recipe) if self.recipe.mixture else self.recipe
        file = localized.mixture and localized.mixture.router
        write_pack(self.shared, {**self.texts, **({ROUTER: Path(file).read_text()} if file else {})}, out)


def model_card(
    shared: SharedRun,
    recipe: Recipe,
    candidate: int,
    changed: Sequence[events.Change] = (),
    format_: Format | None = None,
    relation: Relation = "merge",
    facts: str = "",
    base: ModelReference | None = None,
    pipeline_tag: str = "text-generation",
) -> str:
    """The README.md of a model: its sources, scores and recipe.

    `changed`: see `Export.of`. `format_` is what the weights are written as, by default a Hugging Face model;
    `relation` the hub's, of the model to its parents; `facts` a sentence on its format. `base` is the model under an
    adapter, by default the recipe's.
    """
    format_ = format_ or Format()
    state = shared.state
    started = state.started
    assert started is not None
    trial = state.trials[candidate]
    listed = [Parent(s["reference"], s["revision"], s["licence"]) for s in started.sources]
    used, under = {*map(str, recipe.references)}, [Parent(str(base or base_of(recipe)))]
    data = Metadata(
        [parent for parent in listed if parent.reference in used],
        relation,
        shared.local,
        name=f"candidate-{candidate}",
        results=[] if changed else _results(shared, candidate, format_),
        pipeline=pipeline_tag,
        base=Metadata(under, local=shared.local).base_models if relation == "adapter" else None,
    )
    head = data.to_yaml()
    changes: list[str] = []
    if models := dict.fromkeys(change.key.removeprefix("sources.").rpartition(".")[0] for change in changed):
        named = ", ".join(f"`{shared.names.get(model, model)}`" for model in models)
        changes = ["", f"**These are not the weights that were scored:** {named} had changed since the run."]
    local: list[str] = []
    if mine := ", ".join(f"`{reference}`" for reference in shared.local):
        local = [
            f"Only the author of this model has {mine}. To merge the recipe, put these models there, or replace the"
            " references in `best.yml` by your own folders or hub ids of the same models.",
            "",
        ]
    makes = "this model again, bit for bit" if format_.kind == "model" else "the merge that this file was made from"
    if recipe.prepare and recipe.prepare.text:
        makes = f"it again with {recipe.prepare.text}, which is not published, up to rounding"
    again = f"`llmevo merge best.yml MODEL` makes {makes}"
    lines = [
        "# A merge found by llmevo",
        "",
        f"Candidate {candidate} of {len(state.trials)}, merged by `{recipe.merge_method}`; it came from"
        f" `{trial.candidate.origin}`. {_found(state, trial)}",
        *_objective(state, trial),
        *changes,
        *(["", said] if (said := " ".join(filter(None, (facts, _scored_as(state, candidate, format_))))) else []),
        *(["", *data.notes] if data.notes else []),
        "",
        *models_table(listed),
        *local,
        *_heldout_table(state, candidate),
        *recipe_lines(recipe),
        f"{recipe.mergekit_clause}." if changed else f"{again}; {recipe.mergekit_clause}.",
        "",
        f"Seed {started.seed}; " + ", ".join(f"{name} {number}" for name, number in started.versions.items()) + ".",
        "",
    ]
    return head + "\n".join(lines)


def _results(shared: SharedRun, candidate: int, format_: Format) -> list[EvalResult]:
    """The held-out scores of a candidate, where it was asked those questions in the format."""
    state = shared.state
    metrics = {task.name: task.metric for task in state.heldout_tasks}
    rows = _rows_in(state, candidate, format_)
    return results_of(rows[0].tasks, metrics, "held-out questions") if rows else []


def _rows_in(state: RunState, candidate: int, format_: Format) -> list[events.HeldOut]:
    """The held-out rows of a candidate whose weights were those that the format has."""
    rows = [row for row in state.heldout.values() if row.candidate == candidate]
    return [row for row in rows if row.quantized == format_.rounding]


def _scored_as(state: RunState, candidate: int, format_: Format) -> str:
    """Say whose scores the card has; empty where all are of weights as the format has them."""
    if state.search_format == format_.rounding:
        return ""
    rounded = f"weights rounded to {state.search_format}"
    said = f"Scores are of {rounded if state.search_format else f'the merge before it was written as {format_}'}."
    rows = _rows_in(state, candidate, format_)
    return f"{said} The row `{rows[0].row}` is of the weights as they are here." if rows else said


def _found(state: RunState, trial: Trial) -> str:
    """The search score, in total and for every task."""
    if trial.score is None:
        return f"It has no score because it failed: {trial.reason}."
    values = {task: state.objective.value(trial.score.tasks, task) for task in state.objective.tasks}
    each = ", ".join(f"{task} {value:.3f}" for task, value in values.items() if value is not None)
    return f"Search score {_score(trial.value, trial.score.stderr)}{f' ({each})' if len(values) > 1 else ''}."


def _objective(state: RunState, trial: Trial) -> list[str]:
    """The constraints that the candidate violates, and its place on the Pareto front."""
    lines: list[str] = []
    if texts := ", ".join(f"`{constraint.text}`" for constraint in state.objective.constraints):
        lines.append(f"Of the constraints {texts} it {trial.reason or 'violates none'} on the search questions.")
    if trial in state.front:
        tasks = ", ".join(state.objective.objectives)
        lines.append(f"It is one of {plural(len(state.front), 'candidate')} on the Pareto front of {tasks}.")
    return lines


def _heldout_table(state: RunState, candidate: int) -> list[str]:
    rows = [*state.heldout.values()]
    if not rows:
        return []
    metrics = {task.name: task.metric for task in state.heldout_tasks}
    tasks = [*rows[0].tasks]
    table = [["model", "score", *tasks], ["---"] * (2 + len(tasks))]
    for row in rows:
        values = [f"{row.tasks[task][metrics.get(task, 'acc,none')]:.3f}" for task in tasks]
        table.append([row.row, _score(row.score, row.stderr), *values])
    table += [[name, "failed", *["–"] * len(tasks)] for name in state.failed_rows]
    note = "Held-out questions took no part in any choice; ± is one standard error."
    own = [row.row for row in rows if row.candidate == candidate]
    kept = [f"- {each}" for each in state.heldout_kept] if "best" in own else []  # they are of the best
    if "best" not in own and (best := state.heldout.get("best")):
        which = f"This model is `{own[0]}`" if own else "This model was not asked them"
        note += f" {which}; `best` is candidate {best.candidate}."
    lines = ["| " + " | ".join(line) + " |" for line in table]
    return ["## Held-out score", "", note, "", *lines, "", *([*kept, ""] if kept else [])]


def _score(value: float, stderr: float) -> str:
    return f"{value:.3f} ± {stderr:.3f}"
