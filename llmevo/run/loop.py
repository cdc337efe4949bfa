"""The main loop of a run: score the start rows, then ask, score and tell until the budget is spent, then the finals.

With a log, the same loop resumes a run; with a log and no way to append to it, it replays and verifies the run.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from llmevo.errors import RunError, plural
from llmevo.merging.mixture.mixture import ROUTER
from llmevo.merging.provenance import Provenance
from llmevo.merging.recipe import QUESTIONS, Recipe
from llmevo.run.dispatch import Dispatcher
from llmevo.run.experiment import Experiment, ask_size, planned_evaluations
from llmevo.run.finals import finished, hold_out, select_finalists
from llmevo.run.llm_calls import answer
from llmevo.run.log import events
from llmevo.run.log.journal import Journal, Observer, check_score
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import ROUTING, RunLog
from llmevo.search.objectives.scalarize import random_weights, scalarize
from llmevo.search.optimizers.base import Optimizer, answered
from llmevo.search.trial import Suggestion, Trial
from llmevo.workers.protocol import Request

Waiting = dict[int, tuple[Recipe, Sequence[Trial]]]
"""{candidate: its recipe, and the trials that it races against}, of candidates that have no score yet."""


def run(experiment: Experiment, journal: Journal) -> RunState:
    """Carry a run to its end."""
    journal.follow(experiment.follow)
    journal.once(events.RunStarted, experiment.started)
    optimizer, dispatcher = experiment.optimizer(), Dispatcher(experiment, journal)
    if journal.ahead and experiment.order:
        _ = experiment.workers  # the workers start while an LLM is asked
    score_generation(experiment, journal, dispatcher, optimizer, start(experiment, journal, optimizer))
    if journal.ahead:
        check_start_rows(journal.state)
    while not journal.state.finished:  # raising the budget of a finished run starts the search again
        search = search_steadily if experiment.order == "steady" else search_by_generations
        search(experiment, journal, dispatcher, optimizer)
        if select_finalists(experiment, journal, dispatcher, optimizer) and hold_out(experiment, journal, dispatcher):
            journal.recomputed(finished(journal.state))
    return journal.state


def carry_on(experiment: Experiment, log: RunLog, observers: Iterable[Observer] = ()) -> RunState:
    """Carry a logged run to its end from wherever it stands; `best.yml` beside the log is the best recipe so far."""
    best: list[tuple[int, str]] = []
    begun = log.file.stat().st_size

    def is_due(name: str) -> bool:
        """Whether a file that takes the models to make is missing, or the log has grown since it was made."""
        return log.file.stat().st_size > begun or not (log.folder / name).exists()

    def write_best(_: object, state: RunState) -> None:
        if state.best and best[-1:] != [(state.best.candidate.id, state.best.reason)]:
            best.append((state.best.candidate.id, state.best.reason))
            recipe = Recipe.model_validate(state.recipes[state.best.candidate.id])
            text = Provenance(state.started.masks).sign(recipe) if state.started else recipe.to_yaml()
            if recipe.prepare and recipe.prepare.text == QUESTIONS:
                log.write(QUESTIONS, experiment.scorer.texts.to_json())
            if recipe.mixture and recipe.mixture.router == ROUTER and is_due(ROUTER):
                log.write(ROUTER, experiment.scorer.router)
            log.write("best.yml", f"# {state.unmet}\n{text}" if state.unmet else text)

    experiment.scorer.remember(RunState.fold(iter(log.recorded)), experiment.name)
    try:
        state = run(experiment, Journal(log.recorded, log.append, [write_best, *observers], experiment.verdicts))
    finally:
        if not experiment.shared:
            experiment.scorer.close()
    # Without workers, which hold the memory that the engine of this process takes.
    best_recipe = Recipe.model_validate(state.recipes[state.best.candidate.id]) if state.best else None
    if best_recipe and best_recipe.mixture and is_due(ROUTING):
        log.write(ROUTING, experiment.scorer.routing(best_recipe))
    return state


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
    if experiment.rules < 3:
        return rows
    return [*rows, *answered(optimizer.ask_start(rows), partial(answer, experiment, journal))]


def ask(experiment: Experiment, journal: Journal, optimizer: Optimizer, size: int) -> list[Suggestion]:
    """Return the optimizer's next candidates."""
    tell(experiment, journal.state, optimizer)
    return answered(optimizer.ask(size), partial(answer, experiment, journal))


def score_generation(
    experiment: Experiment,
    journal: Journal,
    dispatcher: Dispatcher,
    optimizer: Optimizer,
    suggestions: Sequence[Suggestion],
) -> None:
    """Log the candidates of one generation, score them, and tell the optimizer of all in the order of their numbers."""
    generation, asked = journal.state.generations, ask_for(experiment, journal, suggestions)
    for wave in waves(experiment, generation, asked):
        rivals = rivals_of(experiment, journal.state, generation)
        waiting: Waiting = {number: (recipe, rivals) for number, recipe in wave}
        while waiting:
            score_one(experiment, journal, dispatcher, waiting)
    told(experiment, journal, optimizer, [number for number, _ in asked])


def search_by_generations(
    experiment: Experiment, journal: Journal, dispatcher: Dispatcher, optimizer: Optimizer
) -> None:
    """Ask for candidates, score all of them, and tell the optimizer, until the budget is spent or none is left."""
    while size := ask_size(experiment, journal.state):
        optimizer.extend(planned_evaluations(experiment, journal.state))
        suggestions = ask(experiment, journal, optimizer, size)
        score_generation(experiment, journal, dispatcher, optimizer, suggestions)
        # A log in which the optimizer was asked again, as earlier versions did, goes on as it says.
        if not suggestions and journal.recorded_next not in (events.Prompted, events.Asked):
            exhaust(experiment, journal, optimizer)


def search_steadily(experiment: Experiment, journal: Journal, dispatcher: Dispatcher, optimizer: Optimizer) -> None:
    """Ask for a candidate whenever a worker is free, and tell the optimizer of each when it is scored.

    What comes next depends on the time that scoring takes, and in a log on the next event.
    """
    state = journal.state
    waiting: Waiting = {}
    while True:
        free, recorded = experiment.worker_count - len(waiting), journal.recorded_next
        size = ask_size(experiment, state, max(free, optimizer.batch)) if free > 0 else 0
        if size and (recorded is None or recorded in (events.Prompted, events.Asked)):
            # A replay reads the judgements of waiting candidates later than they were made, so no forecast is the same.
            optimizer.extend(experiment.evaluations)
            optimizer.expect([state.candidates[number].suggestion for number in waiting])
            suggestions = ask(experiment, journal, optimizer, size)
            if not suggestions:
                exhaust(experiment, journal, optimizer)
            rivals = rivals_of(experiment, state, state.generations)
            waiting |= {number: (recipe, rivals) for number, recipe in ask_for(experiment, journal, suggestions)}
        elif waiting:
            told(experiment, journal, optimizer, [score_one(experiment, journal, dispatcher, waiting)])
        else:
            return


def exhaust(experiment: Experiment, journal: Journal, optimizer: Optimizer) -> None:
    """End the search, which has no candidate left."""
    experiment.exhausted = True
    if journal.ahead:
        name = experiment.config.search.optimizer
        found, more = "path", "Allow more edits, kinds or layers in genome.path for more candidates"
        if not optimizer.learns_paths:
            found, more = "candidate", "All models that the genome allows are scored; give it more methods or numbers"
        experiment.scorer.warn(f"The search ends with budget left: {name!r} finds no further {found}. {more}")


def ask_for(experiment: Experiment, journal: Journal, suggestions: Sequence[Suggestion]) -> list[tuple[int, Recipe]]:
    """Log new candidates, and return their numbers and recipes."""
    first = len(journal.state.candidates)
    recipes = [experiment.space.decode(suggestion.genes, suggestion.path) for suggestion in suggestions]
    journal.recomputed(events.asked(journal.state.generations, first, suggestions, recipes))
    return [*enumerate(recipes, start=first)]


def score_one(
    experiment: Experiment,
    journal: Journal,
    dispatcher: Dispatcher,
    waiting: Waiting,
) -> int:
    """Take the next score of the waiting candidates, each with its rivals, and return its number."""

    def make() -> events.Evaluated | events.Failed:
        requests = [
            Request(
                number,
                recipe,
                rivals=[rival.score for rival in rivals if rival.score],
                quantize=experiment.config.engine.search_format,
            )
            for number, (recipe, rivals) in waiting.items()
        ]
        result = dispatcher.first_of(requests)
        return experiment.event_of(result, waiting[int(result.id)][1])

    made = journal.once((events.Evaluated, events.Failed), make)
    if made.candidate not in waiting:
        journal.expect(made, candidate=next(iter(waiting)))
    _, rivals = waiting.pop(made.candidate)
    if isinstance(made, events.Evaluated):
        check_score(journal, made, next(iter(rivals), None), experiment.config.counted)
    return made.candidate


def told(experiment: Experiment, journal: Journal, optimizer: Optimizer, numbers: Sequence[int]) -> None:
    """Tell the optimizer of scored candidates."""
    state = journal.state
    trials = [state.trials[number] for number in numbers]
    tell(experiment, state, optimizer, trials)
    journal.recomputed(
        events.Told(
            generation=len(state.told),
            state=optimizer.state(),
            sigma=optimizer.sigma,
            best=state.best.candidate.id if state.best else None,
            trust=optimizer.trust,
            candidates=[*numbers],
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
    points = {trial.candidate.id for trial in everything if trial.candidate.lies_in(experiment.space)}
    inside = [trial for trial in everything if optimizer.learns_paths or trial.candidate.id in points]
    optimizer.beside = [trial for trial in everything if trial.candidate.id not in points]
    told = [trial for trial in inside if trial.candidate.id in fresh]
    if not state.objective.plain:
        weights = random_weights(state.objective, len(state.told))
        known = [trial for trial in inside if trial.candidate.id not in fresh]
        known, told = (scalarize(trials, everything, state.objective, weights) for trials in (known, told))
        optimizer.retell(known, weights)
    if new is not None:
        optimizer.tell(told)
