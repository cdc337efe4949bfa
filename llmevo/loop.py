"""The run: score the start rows, then ask, merge, score and tell until the budget is spent; then hold out.

Read with a log it resumes; read with a log and no way to append it replays and verifies.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from llmevo import events
from llmevo.aims import emphasis, valued
from llmevo.bench import Bench
from llmevo.dialogue import answer
from llmevo.errors import CandidateError
from llmevo.journal import Journal, Observer
from llmevo.optimizers import Optimizer
from llmevo.optimizers.base import Retold
from llmevo.optimizers.llm import LlmOff
from llmevo.provenance import Provenance
from llmevo.racing import difference
from llmevo.recipe import Recipe
from llmevo.runlog import RunLog, RunState
from llmevo.trial import Candidate, Suggestion, Trial


def run(bench: Bench, journal: Journal) -> RunState:
    """Carry a run to its end."""
    journal.follow(bench.follow)
    journal.once(events.RunStarted, bench.started)
    book = bench.book = journal.state.book
    book.write = lambda statement: journal.aside(events.said(statement, len(journal.state.told)))
    optimizer = bench.optimizer()
    generation(bench, journal, optimizer, start_rows(bench))
    while not journal.state.finished:  # a budget that is raised after the end begins the search again
        while size := ask_size(bench, journal.state):
            if isinstance(optimizer, LlmOff):  # the others plan with what they began with
                optimizer.extend(bench.evaluations)
            generation(bench, journal, optimizer, ask(bench, journal, optimizer, size))
        if select(bench, journal, optimizer) and hold_out(bench, journal):
            journal.recomputed(finished(journal.state))
    return journal.state


def carry_on(bench: Bench, log: RunLog, observers: Iterable[Observer] = ()) -> RunState:
    """Carry a logged run to its end from wherever it stands, with the best recipe so far always beside its log."""
    best: list[tuple[int, str]] = []

    def keep_best(_: object, state: RunState) -> None:
        if state.best and best[-1:] != [(state.best.candidate.id, state.best.reason)]:
            best.append((state.best.candidate.id, state.best.reason))
            recipe = Recipe.model_validate(state.recipes[best[-1][0]])
            text = Provenance(state.started.masks).sign(recipe) if state.started else recipe.to_yaml()
            log.write("best.yml", f"# {state.unmet}\n{text}" if state.unmet else text)

    bench.rig.remember(RunState.fold(iter(log.recorded)))
    return run(bench, Journal(log.recorded, log.append, [keep_best, *observers]))


def population(bench: Bench) -> int:
    """Candidates a generation: the config's, or the rule of CMA-ES (https://arxiv.org/abs/1604.00772, eq. 48)."""
    return bench.config.search.population or 4 + int(3 * math.log(len(bench.space.genes)))


def ask_size(bench: Bench, state: RunState) -> int:
    """Candidates of the next generation; 0 when the budget is spent, or no further one is sure to fit into it."""
    return bench.config.search.budget.size(state, population(bench))


def start_rows(bench: Bench) -> list[Suggestion]:
    """What the search has to beat: every parent alone, the uniform merge, and what the user has already."""
    space = bench.space
    rows = [Suggestion(space.parent(model), "parent", space.names[model]) for model in space.merged]
    rows.append(Suggestion(space.uniform(), "uniform"))
    rows += bench.own_rows
    if bench.config.random_init:
        point = np.random.default_rng(bench.config.search.seed).random(len(space.genes))
        rows.append(Suggestion(space.from_unit(point), "random", "random_init"))
    return rows


def ask(bench: Bench, journal: Journal, optimizer: Optimizer, size: int) -> list[Suggestion]:
    """The optimizer's next candidates; its prompts are answered on the way."""
    tell(bench, journal.state, optimizer)
    asking = optimizer.ask(size)
    try:
        prompt = next(asking)
        while True:
            prompt = asking.send(answer(bench, journal, prompt))
    except StopIteration as done:
        return done.value


def generation(bench: Bench, journal: Journal, optimizer: Optimizer, suggestions: Sequence[Suggestion]) -> None:
    """Admit, score and tell one generation."""
    state, number = journal.state, len(journal.state.told)
    first = len(state.candidates)
    recipes = [bench.space.decode(suggestion.genes) for suggestion in suggestions]
    asked = events.Asked(
        generation=number,
        candidates=[
            {"id": first + i, "origin": s.origin, "genes": s.genes, "recipe": recipe.as_dict(), "note": s.note}
            for i, (s, recipe) in enumerate(zip(suggestions, recipes, strict=True))
        ],
    )
    for candidate, recipe in zip(journal.recomputed(asked).read(), recipes, strict=True):
        # What there was before the search is asked everything. Who violates a constraint is no rival: another may be
        # the best with a lower score; nor is one of a log of before the scores of questions were kept.
        whole = state.asked_all if number else []
        rivals = [trial for trial in whole if trial.score and trial.score.item_scores]
        if rivals[:1] != whole[:1] or (rivals and rivals[0].violation):
            rivals = []
        made = journal.once(
            (events.Evaluated, events.Failed), lambda c=candidate, r=recipe, v=rivals: _scored(bench, c, r, v)
        )
        journal.expect(made, candidate=candidate.id)
        if isinstance(made, events.Evaluated):
            _check_score(journal, made, next(iter(rivals), None), bench.config.counted)
    trials = [state.trials[first + i] for i in range(len(suggestions))]
    tell(bench, state, optimizer, trials)
    best = state.best.candidate.id if state.best else None
    trust: float | None = getattr(optimizer, "trust", None)  # not all of them have an LLM to trust
    told = events.Told(
        generation=number,
        state=optimizer.state(),
        sigma=optimizer.sigma,
        best=best,
        trust=trust,
        violations={trial.candidate.id: trial.violation for trial in trials if trial.violation},
    )
    journal.recomputed(told)


def tell(bench: Bench, state: RunState, optimizer: Optimizer, new: Sequence[Trial] | None = None) -> None:
    """Tell the optimizer of new trials, and before that, what those that it knows are worth by now: see
    `llmevo.aims.valued`. Where the score alone ranks trials that never changes, and nothing is told again.
    """
    # A parent may lie outside the bounds that the user has drawn; it is a row to beat, not a point of the space.
    told = [trial for trial in new or () if bench.space.contains(trial.candidate.genes)]
    if state.aims.plain:
        known: list[Trial] = []
    else:
        fresh = {trial.candidate.id for trial in new or ()}
        everything = [*state.trials.values()]
        weights = emphasis(state.aims, len(state.told))
        known = [t for t in everything if t.candidate.id not in fresh and bench.space.contains(t.candidate.genes)]
        known, told = (valued(trials, everything, state.aims, weights) for trials in (known, told))
        if isinstance(optimizer, Retold):
            optimizer.retell(known, weights)
    if new is not None:
        optimizer.tell(told)


def _scored(
    bench: Bench, candidate: Candidate, recipe: Recipe, rivals: Sequence[Trial]
) -> events.Evaluated | events.Failed:
    """One candidate's event. Whatever is wrong with it is its reason, never the run's end."""
    started = time.monotonic()
    try:
        score, seconds = bench.score(recipe, rivals=[rival.score for rival in rivals if rival.score])
    except CandidateError as error:
        return events.of_trial(Trial(candidate, None, str(error), {"evaluate": time.monotonic() - started}))
    stopped_by = rivals[0].candidate.id if rivals and score.items < bench.evaluator.items else None
    return events.of_trial(Trial(candidate, score, seconds=seconds), stopped_by)


def select(bench: Bench, journal: Journal, optimizer: Optimizer) -> bool:
    """Ask the best candidates, the best parent and the uniform merge what none was asked before, to choose by both.

    False: the budget was raised meanwhile.
    """
    state = journal.state
    if not state.started or not state.started.selection_items:
        return True
    recommended: Trial | None = optimizer.recommend() if isinstance(optimizer, LlmOff) else None
    if recommended and not state.aims.plain:  # it was told another value of it, which the emphasis has a say in
        recommended = None if state.aims.pareto else state.trials[recommended.candidate.id]
    finalists = finalists_of(state, bench.config.search.finalists, recommended)
    for trial in finalists:
        number, recipe = trial.candidate.id, bench.space.decode(trial.candidate.genes)
        known = state.selected.get(number)
        if known and known.generation == len(state.told):
            continue
        place = {"candidate": number, "generation": len(state.told), "finalists": len(finalists)}
        made = journal.once(events.Selected, lambda r=recipe, k=known, p=place: _selected(bench, r, k, p))
        journal.expect(made, **place)
        _check_sum(journal, made, bench.config.counted)
        if ask_size(bench, state):
            return False
    return True


def finalists_of(state: RunState, count: int, recommended: Trial | None = None) -> list[Trial]:
    """The best so far that were asked everything, the best parent and the uniform merge, and whoever a constraint's
    bound is counted from; what the optimizer recommends, which under noise may be another, takes the place of the last
    of the best.
    """
    whole = state.asked_all
    rivals = [
        next((trial for trial in whole if trial.candidate.origin == origin), None) for origin in ("parent", "uniform")
    ]
    rows = [state.keeping.row(constraint) for constraint in state.aims.constraints if constraint.row]
    best = (state.front or whole)[:count]
    if recommended in whole and recommended not in best and best[-1].violation >= recommended.violation:
        best[-1:] = [recommended]
    others = {trial.candidate.id: trial for trial in (*rivals, *rows) if trial and trial not in best}
    return [*best, *others.values()]


def _selected(bench: Bench, recipe: Recipe, known: events.Selected | None, place: dict[str, int]) -> events.Selected:
    """A finalist's event. One of an earlier choice is not asked again."""
    if known:
        said = known.model_dump(exclude={"time", "schema_", "event", "seconds", "cached", *place})
        return events.Selected(**place, **said, seconds={}, cached=True)
    score, seconds = bench.score(recipe, "selection")
    return events.Selected(**place, **events.scored(score, seconds))


def hold_out(bench: Bench, journal: Journal) -> bool:
    """Score base, parents, uniform merge and the best on questions that nothing was chosen by.

    What was held out before the budget was raised is not scored again. False: it was raised meanwhile.
    """
    best = journal.state.best
    if not bench.config.heldout_tasks or best is None:
        return True
    genome, space = bench.config.genome, bench.space
    rows: list[tuple[str, str, int | None, Recipe]] = []
    if genome.base_model and genome.base_model not in space.merged:
        rows.append(("base", "base", None, Recipe.of_one(genome.base_model, genome.dtype)))
    for trial in journal.state.trials.values():
        if trial.score and trial.candidate.origin in ("parent", "uniform"):
            candidate = trial.candidate
            rows.append((candidate.note or "uniform", candidate.origin, candidate.id, space.decode(candidate.genes)))
    rows.append(("best", "best", best.candidate.id, space.decode(best.candidate.genes)))
    for name, kind, candidate, recipe in rows:
        known = journal.state.heldout.get(name)
        if known is None or known.candidate != candidate:
            row = journal.once(events.HeldOut, lambda row=(name, kind, candidate), r=recipe: _held_out(bench, row, r))
            journal.expect(row, row=name, kind=kind, candidate=candidate)
            _check_sum(journal, row, {task.name: (task.weight, task.metric) for task in bench.config.heldout_tasks})
        if ask_size(bench, journal.state):
            return False
    return True


def _check_score(
    journal: Journal, event: events.Evaluated, rival: Trial | None, counted: Mapping[str, tuple[float, str]]
) -> None:
    """Of a candidate that was stopped, the rival's score and the difference on what both were asked."""
    if event.rival is None:
        _check_sum(journal, event, counted)
        return
    journal.expect(event, rival=rival.candidate.id if rival else None)
    assert rival
    assert rival.score
    weights = {task: weight for task, (weight, _) in counted.items()}
    journal.expect(
        event, score=rival.score.total + difference(event.item_scores, rival.score.item_scores, weights).mean
    )


def _check_sum(journal: Journal, event: events.Scored, counted: Mapping[str, tuple[float, str]]) -> None:
    """A score is the weighted sum of its tasks' metrics: see `weigh`."""
    total, book = 0.0, journal.state.book
    for task, (weight, metric) in counted.items():
        standing = None if event.cached else book.standing(task)
        if standing is not None and event.tasks[task][metric] != standing:
            raise journal.broken(f"{task} is {event.tasks[task][metric]} in the log and {standing} by its votes")
        total += weight * event.tasks.get(task, {}).get(metric, math.nan)
    if math.isfinite(total):
        journal.expect(event, score=total)


def _held_out(bench: Bench, row: tuple[str, str, int | None], recipe: Recipe) -> events.HeldOut:
    name, kind, candidate = row
    score, seconds = bench.score(recipe, "heldout")
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
