"""The main loop of a run: score the start rows, then ask, score and tell until the budget is spent, then the finals.

With a log, the same loop resumes a run; with a log and no way to append to it, it replays and verifies the run.
"""

from collections.abc import Iterable, Iterator, Sequence

from llmevo.errors import RunError, plural
from llmevo.merging.recipe import Provenance, Recipe
from llmevo.run.dispatch import Dispatcher
from llmevo.run.experiment import Experiment, ask_size
from llmevo.run.finals import finished, hold_out, select_finalists
from llmevo.run.llm_calls import answer
from llmevo.run.log import events
from llmevo.run.log.journal import Journal, Observer, check_score
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import RunLog
from llmevo.search.objectives.scalarize import random_weights, scalarize
from llmevo.search.optimizers.base import Asking, Optimizer
from llmevo.search.trial import Suggestion, Trial
from llmevo.workers.protocol import Request


def run(experiment: Experiment, journal: Journal) -> RunState:
    """Carry a run to its end."""
    journal.follow(experiment.follow)
    journal.once(events.RunStarted, experiment.started)
    optimizer, dispatcher = experiment.optimizer(), Dispatcher(experiment, journal)
    score_generation(experiment, journal, dispatcher, optimizer, start(experiment, journal, optimizer))
    if journal.ahead:
        check_start_rows(journal.state)
    while not journal.state.finished:  # raising the budget of a finished run starts the search again
        while size := ask_size(experiment, journal.state):
            optimizer.extend(experiment.evaluations)
            score_generation(experiment, journal, dispatcher, optimizer, ask(experiment, journal, optimizer, size))
        if select_finalists(experiment, journal, dispatcher, optimizer) and hold_out(experiment, journal, dispatcher):
            journal.recomputed(finished(journal.state))
    return journal.state


def carry_on(experiment: Experiment, log: RunLog, observers: Iterable[Observer] = ()) -> RunState:
    """Carry a logged run to its end from wherever it stands; `best.yml` beside the log is the best recipe so far."""
    best: list[tuple[int, str]] = []

    def write_best(_: object, state: RunState) -> None:
        if state.best and best[-1:] != [(state.best.candidate.id, state.best.reason)]:
            best.append((state.best.candidate.id, state.best.reason))
            recipe = Recipe.model_validate(state.recipes[state.best.candidate.id])
            text = Provenance(state.started.masks).sign(recipe) if state.started else recipe.to_yaml()
            log.write("best.yml", f"# {state.unmet}\n{text}" if state.unmet else text)

    experiment.scorer.remember(RunState.fold(iter(log.recorded)))
    try:
        return run(experiment, Journal(log.recorded, log.append, [write_best, *observers], experiment.verdicts))
    finally:
        if not experiment.shared:
            experiment.scorer.close()


def check_start_rows(state: RunState) -> None:
    """Raise RunError when every start row failed: the other candidates would fail for the same reason."""
    trials = [*state.trials.values()]
    if not any(trial.score for trial in trials):
        raise RunError(
            f"all {plural(len(trials), 'start row')} failed, the first with: {trials[0].reason}. Solve that and start a"
            " new run"
        )


def start(experiment: Experiment, journal: Journal, optimizer: Optimizer) -> list[Suggestion]:
    """Return the start rows: the experiment's and, before anything is scored, the LLM's."""
    rows = experiment.start_rows
    return [*rows, *answered(experiment, journal, optimizer.ask_start(rows))] if experiment.rules > 2 else rows


def ask(experiment: Experiment, journal: Journal, optimizer: Optimizer, size: int) -> list[Suggestion]:
    """Return the optimizer's next candidates."""
    tell(experiment, journal.state, optimizer)
    return answered(experiment, journal, optimizer.ask(size))


def answered(experiment: Experiment, journal: Journal, asking: Asking) -> list[Suggestion]:
    """Return the candidates of an optimizer that is asked; the LLM answers the prompts that it yields."""
    try:
        prompt = next(asking)
        while True:
            prompt = asking.send(answer(experiment, journal, prompt))
    except StopIteration as done:
        return done.value


def score_generation(
    experiment: Experiment,
    journal: Journal,
    dispatcher: Dispatcher,
    optimizer: Optimizer,
    suggestions: Sequence[Suggestion],
) -> None:
    """Log the candidates of one generation, score them, and tell the optimizer of all in the order of their numbers."""
    state, generation, first = journal.state, journal.state.generations, len(journal.state.candidates)
    recipes = [experiment.space.decode(suggestion.genes) for suggestion in suggestions]
    journal.recomputed(events.asked(generation, first, suggestions, recipes))
    for wave in waves(experiment, generation, [*enumerate(recipes, start=first)]):
        rivals = rivals_of(experiment, state, generation)
        scores = [rival.score for rival in rivals if rival.score]
        waiting = {number: Request(number, recipe, rivals=scores) for number, recipe in wave}
        while waiting:
            made = journal.once(
                (events.Evaluated, events.Failed),
                lambda w=waiting, r=rivals: experiment.event_of(dispatcher.first_of([*w.values()]), r),
            )
            if made.candidate not in waiting:
                journal.expect(made, candidate=next(iter(waiting)))
            del waiting[made.candidate]
            if isinstance(made, events.Evaluated):
                check_score(journal, made, next(iter(rivals), None), experiment.config.counted)
    trials = [state.trials[first + place] for place in range(len(suggestions))]
    tell(experiment, state, optimizer, trials)
    journal.recomputed(
        events.Told(
            generation=generation,
            state=optimizer.state(),
            sigma=optimizer.sigma,
            best=state.best.candidate.id if state.best else None,
            trust=optimizer.trust,
            violations={trial.candidate.id: trial.violation for trial in trials if trial.violation},
        )
    )


def waves(
    experiment: Experiment, generation: int, recipes: Sequence[tuple[int, Recipe]]
) -> Iterator[Sequence[tuple[int, Recipe]]]:
    """Yield the candidates that are scored at the same time. All of them race against the trials before: the first
    start row, the uniform merge, is scored alone, so that there is a rival.
    """
    if not experiment.order:
        yield from ([each] for each in recipes)
        return
    alone = 0 if generation else 1
    yield from filter(None, (recipes[:alone], recipes[alone:]))


def rivals_of(experiment: Experiment, state: RunState, generation: int) -> list[Trial]:
    """Return the fully evaluated trials that a candidate races against, the best first; none where it is not raced."""
    if not (generation or experiment.races_start_rows):
        return []
    complete = state.asked_all
    rivals = [trial for trial in complete if trial.score and trial.score.item_scores]  # older logs have none
    if rivals[:1] != complete[:1] or (rivals and rivals[0].violation):
        return []  # a candidate may beat one that violates a constraint with a lower score
    return rivals


def tell(experiment: Experiment, state: RunState, optimizer: Optimizer, new: Sequence[Trial] | None = None) -> None:
    """Tell the optimizer of new trials.

    Constraints and several objectives change the values of earlier trials over time (see
    `llmevo.search.objectives.scalarize`), so the optimizer is told these again first.
    """
    everything, fresh = [*state.trials.values()], {trial.candidate.id for trial in new or ()}
    # A parent may lie outside the user's bounds: it is a row to beat, but no point of the search space.
    inside = [trial for trial in everything if experiment.space.contains(trial.candidate.genes)]
    told = [trial for trial in inside if trial.candidate.id in fresh]
    if not state.aims.plain:
        weights = random_weights(state.aims, len(state.told))
        known = [trial for trial in inside if trial.candidate.id not in fresh]
        known, told = (scalarize(trials, everything, state.aims, weights) for trials in (known, told))
        optimizer.retell(known, weights)
    if new is not None:
        optimizer.tell(told)
