"""The run: score the start rows, then ask, merge, score and tell until the budget is spent; then hold out.

Read with a log it resumes; read with a log and no way to append it replays and verifies.
"""

import time
from collections.abc import Iterable, Sequence

import numpy as np

from llmevo.errors import CandidateError, MachineError, RunError, plural
from llmevo.merging.provenance import Provenance
from llmevo.merging.recipe import Recipe
from llmevo.run.experiment import Experiment, ask_size
from llmevo.run.finals import finished, hold_out, select
from llmevo.run.llm_calls import answer
from llmevo.run.log import events
from llmevo.run.log.journal import Journal, Observer, check_score
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import RunLog
from llmevo.search.objectives.scalarize import random_weights, scalarize
from llmevo.search.optimizers.base import Optimizer
from llmevo.search.trial import Candidate, Suggestion, Trial


def run(experiment: Experiment, journal: Journal) -> RunState:
    """Carry a run to its end."""
    journal.follow(experiment.follow)
    journal.once(events.RunStarted, experiment.started)
    book = experiment.book = journal.state.book
    book.write = lambda statement: journal.aside(events.said(statement, len(journal.state.told)))
    optimizer = experiment.optimizer()
    generation(experiment, journal, optimizer, start_rows(experiment))
    if journal.ahead:
        check_begun(journal.state)
    while not journal.state.finished:  # a budget that is raised after the end begins the search again
        while size := ask_size(experiment, journal.state):
            optimizer.extend(experiment.evaluations)
            generation(experiment, journal, optimizer, ask(experiment, journal, optimizer, size))
        if select(experiment, journal, optimizer) and hold_out(experiment, journal):
            journal.recomputed(finished(journal.state))
    return journal.state


def check_begun(state: RunState) -> None:
    """Raise RunError when no start row has a score: what is wrong with all of them is wrong with the rest."""
    trials = [*state.trials.values()]
    if not any(trial.score for trial in trials):
        first = f"the first one with: {trials[0].reason}"
        raise RunError(f"all {plural(len(trials), 'start row')} failed, {first}. Mend that and begin a new run")


def carry_on(experiment: Experiment, log: RunLog, observers: Iterable[Observer] = ()) -> RunState:
    """Carry a logged run to its end from wherever it stands, with the best recipe so far always beside its log."""
    best: list[tuple[int, str]] = []

    def keep_best(_: object, state: RunState) -> None:
        if state.best and best[-1:] != [(state.best.candidate.id, state.best.reason)]:
            best.append((state.best.candidate.id, state.best.reason))
            recipe = Recipe.model_validate(state.recipes[best[-1][0]])
            text = Provenance(state.started.masks).sign(recipe) if state.started else recipe.to_yaml()
            log.write("best.yml", f"# {state.unmet}\n{text}" if state.unmet else text)

    experiment.scorer.remember(RunState.fold(iter(log.recorded)))
    return run(experiment, Journal(log.recorded, log.append, [keep_best, *observers]))


def start_rows(experiment: Experiment) -> list[Suggestion]:
    """What the search has to beat: the uniform merge, the same with other weights for all models, every parent alone,
    and what the user has already.
    """
    space = experiment.space
    rows = [Suggestion(space.parent(model), "parent", space.names[model]) for model in space.merged]
    # Parents are stopped early against it, where they are worse; in older logs it was the last of them.
    rows.insert(0 if experiment.rules else len(rows), Suggestion(space.uniform(), "uniform"))
    rows[1:1] = experiment.coefficients
    rows += experiment.own_rows
    if experiment.config.random_init:
        point = np.random.default_rng(experiment.config.search.seed).random(len(space.genes))
        rows.append(Suggestion(space.from_unit(point), "random", "random_init"))
    return rows


def ask(experiment: Experiment, journal: Journal, optimizer: Optimizer, size: int) -> list[Suggestion]:
    """The optimizer's next candidates; its prompts are answered on the way."""
    tell(experiment, journal.state, optimizer)
    asking = optimizer.ask(size)
    try:
        prompt = next(asking)
        while True:
            prompt = asking.send(answer(experiment, journal, prompt))
    except StopIteration as done:
        return done.value


def generation(
    experiment: Experiment, journal: Journal, optimizer: Optimizer, suggestions: Sequence[Suggestion]
) -> None:
    """Admit, score and tell one generation."""
    state, number = journal.state, len(journal.state.told)
    first = len(state.candidates)
    recipes = [experiment.space.decode(suggestion.genes) for suggestion in suggestions]
    asked = events.Asked(
        generation=number,
        candidates=[
            {"id": first + i, "origin": s.origin, "genes": s.genes, "recipe": recipe.as_dict(), "note": s.note}
            for i, (s, recipe) in enumerate(zip(suggestions, recipes, strict=True))
        ],
    )
    for place, candidate in enumerate(journal.recomputed(asked).read()):
        # Who violates a constraint is no rival: another may be the best with a lower score; nor is one of a log of
        # before the scores of questions were kept.
        whole = state.asked_all if number or experiment.races_start_rows else []
        rivals = [trial for trial in whole if trial.score and trial.score.item_scores]
        if rivals[:1] != whole[:1] or (rivals and rivals[0].violation):
            rivals = []
        made = journal.once(
            (events.Evaluated, events.Failed),
            lambda c=candidate, r=recipes[place], v=rivals: _scored(experiment, c, r, v),
        )
        journal.expect(made, candidate=candidate.id)
        if isinstance(made, events.Evaluated):
            check_score(journal, made, next(iter(rivals), None), experiment.config.counted)
    trials = [state.trials[first + i] for i in range(len(suggestions))]
    tell(experiment, state, optimizer, trials)
    best = state.best.candidate.id if state.best else None
    told = events.Told(
        generation=number,
        state=optimizer.state(),
        sigma=optimizer.sigma,
        best=best,
        trust=optimizer.trust,
        violations={trial.candidate.id: trial.violation for trial in trials if trial.violation},
    )
    journal.recomputed(told)


def tell(experiment: Experiment, state: RunState, optimizer: Optimizer, new: Sequence[Trial] | None = None) -> None:
    """Tell the optimizer of new trials, and before that, what those that it knows are worth by now: see
    `llmevo.search.objectives.valued`. Where the score alone ranks trials that never changes, and nothing is told again.
    """
    # A parent may lie outside the bounds that the user has drawn; it is a row to beat, not a point of the space.
    told = [trial for trial in new or () if experiment.space.contains(trial.candidate.genes)]
    if state.aims.plain:
        known: list[Trial] = []
    else:
        fresh = {trial.candidate.id for trial in new or ()}
        everything = [*state.trials.values()]
        weights = random_weights(state.aims, len(state.told))
        known = [t for t in everything if t.candidate.id not in fresh and experiment.space.contains(t.candidate.genes)]
        known, told = (scalarize(trials, everything, state.aims, weights) for trials in (known, told))
        optimizer.retell(known, weights)
    if new is not None:
        optimizer.tell(told)


def _scored(
    experiment: Experiment, candidate: Candidate, recipe: Recipe, rivals: Sequence[Trial]
) -> events.Evaluated | events.Failed:
    """Score one candidate.

    A fault of the candidate becomes its `failed` event; a fault of the machine (MachineError) ends the session, and the
    run can be resumed.
    """
    started = time.monotonic()
    try:
        score, seconds = experiment.score(recipe, rivals=[rival.score for rival in rivals if rival.score])
    except CandidateError as error:
        return events.of_trial(Trial(candidate, None, str(error), {"evaluate": time.monotonic() - started}))
    except MachineError as error:
        raise MachineError(f"candidate {candidate.id}: {error}", error.kind) from error
    stopped = bool(rivals) and score.items < experiment.evaluator.items
    return events.of_trial(Trial(candidate, score, seconds=seconds), rivals[0].candidate.id if stopped else None)
