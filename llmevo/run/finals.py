"""After the search: the finalists are asked further questions, and what came out is held out."""

from llmevo.errors import CandidateError
from llmevo.merging.recipe import Recipe
from llmevo.run.experiment import Experiment, ask_size
from llmevo.run.log import events
from llmevo.run.log.journal import Journal, check_sum
from llmevo.run.log.state import RunState
from llmevo.search.objectives.scalarize import scalarize
from llmevo.search.optimizers.base import Optimizer
from llmevo.search.optimizers.recommendation import recommend
from llmevo.search.trial import Trial


def select(experiment: Experiment, journal: Journal, optimizer: Optimizer) -> bool:
    """Ask the best candidates, the best parent, the uniform merge and the best other weight for all models what none
    was asked before, to choose by both.

    False: the budget was raised meanwhile.
    """
    state = journal.state
    if not state.started or not state.started.selection_items:
        return True
    finalists = finalists_of(state, experiment.config.search.finalists, _recommended(experiment, state, optimizer))
    if experiment.rules > 1:
        finalists = [whole for trial in finalists if (whole := asked_all(experiment, journal, trial)).score]
    for trial in finalists:
        number, recipe = trial.candidate.id, experiment.space.decode(trial.candidate.genes)
        known = state.selected.get(number)
        if known and known.generation == len(state.told):
            continue
        place = {"candidate": number, "generation": len(state.told), "finalists": len(finalists)}
        made = journal.once(events.Selected, lambda r=recipe, k=known, p=place: _selected(experiment, r, k, p))
        journal.expect(made, **place)
        check_sum(journal, made, experiment.config.counted)
        if ask_size(experiment, state):
            return False
    return True


def _recommended(experiment: Experiment, state: RunState, optimizer: Optimizer) -> Trial | None:
    """See `search.optimizers.recommend`; None where there are several aims, for then no one trial is the best."""
    if state.aims.pareto:
        return None
    if experiment.rules < 2:  # the optimizer's own, where it had one
        found = optimizer.recommend()
    else:
        everything = [*state.trials.values()]
        inside = [trial for trial in everything if experiment.space.contains(trial.candidate.genes)]
        found = recommend(experiment.space, scalarize(inside, everything, state.aims, {}))
    return state.trials[found.candidate.id] if found else None  # it may have been told another value of it


def asked_all(experiment: Experiment, journal: Journal, trial: Trial) -> Trial:
    """A finalist, with a score on all search questions: one that was stopped is asked the rest, and is evaluated a
    second time in the log, for an estimate on some is not compared with scores on all.
    """
    state, number = journal.state, trial.candidate.id
    if state.started is None or trial.score is None or trial.score.items >= state.started.items:
        return trial
    recipe = experiment.space.decode(trial.candidate.genes)
    made = journal.once((events.Evaluated, events.Failed), lambda: _evaluated(experiment, trial, recipe))
    journal.expect(made, candidate=number)
    if isinstance(made, events.Evaluated):
        journal.expect(made, rival=None)
        check_sum(journal, made, experiment.config.counted)
    return state.trials[number]


def _evaluated(experiment: Experiment, trial: Trial, recipe: Recipe) -> events.Evaluated | events.Failed:
    try:
        score, seconds = experiment.score(recipe)
    except CandidateError as error:
        return events.of_trial(Trial(trial.candidate, None, str(error)))
    return events.of_trial(Trial(trial.candidate, score, seconds=seconds))


def finalists_of(state: RunState, count: int, recommended: Trial | None = None) -> list[Trial]:
    """The best so far that were asked everything, the best parent, the uniform merge, the best other weight for all
    models, and whoever a constraint's bound is counted from; what is recommended, which under noise may be another,
    also one that was stopped, takes the place of the last of the best.
    """
    whole = state.asked_all
    uniform = next((trial for trial in whole if trial.candidate.origin == "uniform"), None)
    rivals = [state.best_parent, uniform, state.best_of("coefficient")]
    rows = [state.keeping.row(constraint) for constraint in state.aims.constraints if constraint.row]
    best = (state.front or whole)[:count]
    # Whether one that was stopped keeps the constraints is not known.
    known = recommended in whole or (state.started and state.started.rules and not state.aims.constraints)
    if recommended and known and best and recommended not in best and best[-1].violation >= recommended.violation:
        best[-1:] = [recommended]
    others = {trial.candidate.id: trial for trial in (*rivals, *rows) if trial and trial not in best}
    return [*best, *others.values()]


def _selected(
    experiment: Experiment, recipe: Recipe, known: events.Selected | None, place: dict[str, int]
) -> events.Selected:
    """A finalist's event. One of an earlier choice is not asked again."""
    if known:
        said = known.model_dump(exclude={"time", "schema_", "event", "seconds", "cached", *place})
        return events.Selected(**place, **said, seconds={}, cached=True)
    score, seconds = experiment.score(recipe, "selection")
    return events.Selected(**place, **events.scored(score, seconds))


def hold_out(experiment: Experiment, journal: Journal) -> bool:
    """Score base, parents, uniform merge, the best other weight for all models, and the best on questions that nothing
    was chosen by.

    What was held out before the budget was raised is not scored again. False: it was raised meanwhile.
    """
    best = journal.state.best
    if not experiment.config.heldout_tasks or best is None:
        return True
    genome, space = experiment.config.genome, experiment.space
    rows: list[tuple[str, str, int | None, Recipe]] = []
    if genome.base_model and genome.base_model not in space.merged:
        rows.append(("base", "base", None, Recipe.of_one(genome.base_model, genome.dtype)))
    for origin in ("parent", "uniform"):
        for trial in journal.state.trials.values():
            if trial.score and (candidate := trial.candidate).origin == origin:
                rows.append((candidate.note or origin, origin, candidate.id, space.decode(candidate.genes)))
    if coefficient := best_coefficient(journal.state):
        candidate = coefficient.candidate
        rows.append((candidate.note, candidate.origin, candidate.id, space.decode(candidate.genes)))
    rows.append(("best", "best", best.candidate.id, space.decode(best.candidate.genes)))
    for name, kind, candidate, recipe in rows:
        known = journal.state.heldout.get(name)
        if known is None or known.candidate != candidate:
            row = journal.once(
                events.HeldOut, lambda row=(name, kind, candidate), r=recipe: _held_out(experiment, row, r)
            )
            journal.expect(row, row=name, kind=kind, candidate=candidate)
            check_sum(journal, row, {task.name: (task.weight, task.metric) for task in experiment.config.heldout_tasks})
        if ask_size(experiment, journal.state):
            return False
    return True


def best_coefficient(state: RunState) -> Trial | None:
    """The best start row with one weight for all models, but the uniform merge, by all that it was asked: those that
    were finalists are compared by both sets of questions, and the one with the best search score is one of them.
    """
    asked = [state.trials[number] for number in state.selected]
    finalists = [trial for trial in asked if trial.candidate.origin == "coefficient"]
    best = max(finalists, key=lambda trial: (-trial.violation, state.pooled(trial)), default=None)
    return best or state.best_of("coefficient")


def _held_out(experiment: Experiment, row: tuple[str, str, int | None], recipe: Recipe) -> events.HeldOut:
    name, kind, candidate = row
    score, seconds = experiment.score(recipe, "heldout")
    said = {task: [*replies] for task, replies in score.replies.items()}
    return events.HeldOut(row=name, kind=kind, candidate=candidate, replies=said, **events.scored(score, seconds))


def finished(state: RunState) -> events.RunFinished:
    """The last event: what came out, all of it read off the events before."""
    best, rows = state.best, state.heldout
    return events.RunFinished(
        best=best.candidate.id if best else None,
        search_score=best.value if best else None,
        violated=best.reason if best else "",
        front=[trial.candidate.id for trial in state.front],
        heldout={
            "score": rows["best"].score,
            "stderr": rows["best"].stderr,
            "rows": [
                {
                    "row": r.row,
                    "kind": r.kind,
                    "candidate": r.candidate,
                    "score": r.score,
                    "stderr": r.stderr,
                    "tasks": r.tasks,
                }
                for r in rows.values()
            ],
        }
        if rows
        else None,
        proposals=proposals(state),
    )


def proposals(state: RunState) -> dict[str, int]:
    """What came of asking the LLM."""
    answered = [event for event in state.prompted if event.reply is not None]
    return {
        "prompts": len(state.prompted),
        "answered": len(answered),
        "lost": sum(event.reply is None and event.calls > 0 for event in state.prompted),
        "unreadable": sum(not event.used for event in answered),
        "capped": sum(not event.calls for event in state.prompted),
        "repairs": sum(event.repair for event in state.prompted),
        "used": sum(candidate.origin == "llm" for candidate in state.candidates.values()),
    }
