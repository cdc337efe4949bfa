"""After the search: finalists answer further questions, and the best of them is scored on held-out questions."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from llmevo.merging.recipe import Recipe
from llmevo.run.dispatch import Dispatcher
from llmevo.run.experiment import Experiment, ask_size
from llmevo.run.log import events
from llmevo.run.log.journal import Journal, check_sum
from llmevo.run.log.state import RunState
from llmevo.search.objectives.scalarize import scalarize
from llmevo.search.optimizers.base import Optimizer
from llmevo.search.optimizers.recommendation import recommend
from llmevo.search.trial import Candidate, Trial
from llmevo.workers.protocol import Request, Result

HELDOUT_FIELDS = {"row", "kind", "candidate", "score", "stderr", "tasks"}
"""Fields of a held-out row that `run_finished` repeats."""


def select_finalists(experiment: Experiment, journal: Journal, dispatcher: Dispatcher, optimizer: Optimizer) -> bool:
    """Score the finalists on questions that no candidate of the search was asked, to choose among them by both; with
    `engine.quantize` then on all these questions in the format in which the best will be served.

    Return False where a `resumed` event in the log raised the budget here: the search then goes on; or where it changed
    the questions or models: the finals then begin again.
    """
    state, served = journal.state, experiment.config.engine.finals_format
    resumed = len(state.resumed)
    if not state.started or not (state.started.selection_items or served):
        return True
    finalists = finalists_of(state, experiment.config.search.finalists, _recommended(experiment, state, optimizer))
    if experiment.rules > 1:
        finalists = [trial for trial in _completed(experiment, journal, dispatcher, finalists) if trial.score]
        if _changed(state, resumed):
            return False
    further = [(trial, "selection") for trial in finalists if state.started.selection_items]
    if not _ask_finalists(experiment, journal, dispatcher, further, len(finalists)):
        return False
    failed = {event.candidate for event in state.failed_in("selected")}
    finalists = [trial for trial in finalists if trial.candidate.id not in failed]
    again = [(trial, questions) for trial in finalists for questions in state.finals_sets if served]
    return _ask_finalists(experiment, journal, dispatcher, again, len(finalists), served)


def _ask_finalists(
    experiment: Experiment,
    journal: Journal,
    dispatcher: Dispatcher,
    asked: Sequence[tuple[Trial, str]],
    count: int,
    served: str = "",
) -> bool:
    """Score finalists, of which there are `count`, on sets of questions; `served` is the format of their weights. One
    that fails is logged with the reason.

    Return False as `select_finalists` does.
    """
    state, counted = journal.state, experiment.config.counted
    resumed = len(state.resumed)
    quantize = served or experiment.config.engine.search_format
    known = {(number, "selection"): event for number, event in state.selected.items()}
    scored: Mapping[tuple[int, str], events.Selected | events.Served] = {**state.served} if served else known
    step: Literal["selected", "served"] = "served" if served else "selected"
    requests: dict[tuple[int, str], Request] = {}
    for trial, questions in asked:
        number, recipe = trial.candidate.id, experiment.space.decode(trial.candidate.genes, trial.candidate.path)
        name = f"finalist {number}" + (f" in {served}, {questions} questions" if served else "")
        requests[number, questions] = Request(name, recipe, questions, quantize=quantize)
    for key, request in requests.items():
        number, questions = key
        earlier = scored.get(key)
        if earlier and earlier.generation == len(state.told):
            continue
        place: dict[str, Any] = {"candidate": number, "generation": len(state.told), "finalists": count}
        place |= {"questions": questions} if served else {}
        kind = events.Served if served else events.Selected
        later = [*requests][[*requests].index(key) + 1 :]
        ahead = [requests[other] for other in later if other not in scored]

        def make(
            kind: type[events.Selected | events.Served] = kind,
            place: Mapping[str, Any] = place,
            earlier: events.Selected | events.Served | None = earlier,
            request: Request = request,
            ahead: Sequence[Request] = ahead,
        ) -> events.Selected | events.Served | events.Unscored:
            if earlier:
                return _taken_over(earlier, place)
            result = dispatcher.of(request, ahead)
            if result.score is None:
                return events.unscored(result, step, quantized=quantize, **place)
            return kind(**place, **events.scored(result, quantize))

        made = journal.once((kind, events.Unscored), make)
        journal.expect(made, **place, quantized=quantize)
        if isinstance(made, events.Scored):
            check_sum(journal, made, counted)
        if ask_size(experiment, state) or _changed(state, resumed):
            return False
    return True


def _changed(state: RunState, resumed: int) -> bool:
    """Whether the questions or models have changed since so many `resumed` events."""
    return any(event.counts for event in state.resumed[resumed:])


def _recommended(experiment: Experiment, state: RunState, optimizer: Optimizer) -> Trial | None:
    """See `search.optimizers.recommendation`; None with several objectives, where no single trial is the best,
    and for layer paths, which are no points of one space.
    """
    if state.objective.pareto or optimizer.learns_paths:
        return None
    if experiment.rules < 2:
        found = optimizer.recommend()
    else:
        everything = [*state.trials.values()]
        inside = [trial for trial in everything if trial.candidate.lies_in(experiment.space)]
        values = scalarize(inside, everything, state.objective, {})
        found = recommend(experiment.space, values, earlier=experiment.rules < 3)
    return state.trials[found.candidate.id] if found else None  # the optimizer may know it with another value


def _completed(
    experiment: Experiment, journal: Journal, dispatcher: Dispatcher, finalists: Sequence[Trial]
) -> list[Trial]:
    """Ask finalists that racing had stopped the remaining search questions: an estimate on some questions is not
    compared with scores on all. The second `evaluated` event of each replaces the first.
    """
    state = journal.state
    items = state.started.items if state.started else 0
    stopped = [trial.candidate for trial in finalists if trial.score and trial.score.items < items]
    quantize = experiment.config.engine.search_format
    requests = [
        Request(candidate.id, experiment.space.decode(candidate.genes, candidate.path), quantize=quantize)
        for candidate in stopped
    ]
    for place, request in enumerate(requests):
        ahead = requests[place + 1 :]
        made = journal.once(
            (events.Evaluated, events.Failed),
            lambda r=request, a=ahead: experiment.event_of(dispatcher.of(r, a)),
        )
        journal.expect(made, candidate=request.id)
        if isinstance(made, events.Evaluated):
            journal.expect(made, rival=None)
            check_sum(journal, made, experiment.config.counted)
    return [state.trials[trial.candidate.id] for trial in finalists]


def finalists_of(state: RunState, count: int, recommended: Trial | None = None) -> list[Trial]:
    """Return the best fully evaluated trials, the best parent, the uniform merge, the best coefficient, and the rows
    that constraints are relative to.

    The recommended trial, which noise may have kept from the top, replaces the last of the best.
    """
    complete = state.asked_all
    uniform = next((trial for trial in complete if trial.candidate.origin == "uniform"), None)
    rivals = [state.best_parent, uniform, state.best_of("coefficient")]
    rows = [state.constraint_checker.row(constraint) for constraint in state.objective.constraints if constraint.row]
    best = (state.front or complete)[:count]
    # A stopped trial is not known to satisfy the constraints.
    known = recommended in complete or (state.rules and not state.objective.constraints)
    if recommended and known and best and recommended not in best and best[-1].violation >= recommended.violation:
        best[-1:] = [recommended]
    others = {trial.candidate.id: trial for trial in (*rivals, *rows) if trial and trial not in best}
    return [*best, *others.values()]


def _taken_over(known: events.Selected | events.Served, place: Mapping[str, Any]) -> events.Selected | events.Served:
    """Take over the score of an earlier selection."""
    earlier = known.model_dump(exclude={"time", "schema_", "event", "seconds", "cached", *place})
    return type(known)(**place, **earlier, seconds={}, cached=True)


def hold_out(experiment: Experiment, journal: Journal, dispatcher: Dispatcher) -> bool:
    """Score base, parents, uniform merge, best coefficient and best candidate on the held-out questions; with
    `engine.quantize` the best also in its other form: rounded, or as it is where all others are rounded.

    Rows that were held out before the budget was raised are not scored again. One that fails is logged with the reason.
    Return False as `select_finalists` does.
    """
    state, space, best = journal.state, experiment.space, journal.state.best
    tasks, resumed = experiment.config.heldout_tasks, len(state.resumed)
    if not tasks or best is None:
        return True
    genome = experiment.config.genome
    if genome.base_model and genome.base_model not in space.merged:
        recipe = space.alone(genome.base_model)
        rows: list[tuple[str, str, int | None, Recipe]] = [("base", "base", None, recipe)]
    else:
        rows = []
    for name, kind, candidate in _heldout_candidates(state, best):
        rows.append((name, kind, candidate.id, space.decode(candidate.genes, candidate.path)))
    engine = experiment.config.engine
    if engine.quantize:
        form, kind = (engine.quantize, "served") if engine.finals_format else (genome.dtype, "plain")
        recipe = space.decode(best.candidate.genes, best.candidate.path)
        rows.append((f"best ({form})", kind, best.candidate.id, recipe))
    if experiment.rules > 4:
        taken = {name for name, kind, *_ in rows if kind != "parent"}
        rows = [
            (name + events.PARENT if kind == "parent" and name in taken else name, kind, candidate, recipe)
            for name, kind, candidate, recipe in rows
        ]
    held = {name: row.candidate for name, row in state.heldout.items()}
    rows = [row for row in rows if row[0] not in held or held[row[0]] != row[2]]
    forms = [engine.finals_format if kind in ("served", "plain") else engine.search_format for _, kind, *_ in rows]
    requests = [
        Request(f"held-out row {name}", recipe, "heldout", quantize=form)
        for (name, _, _, recipe), form in zip(rows, forms, strict=True)
    ]
    for request, (name, kind, number, _) in zip(requests, rows, strict=True):
        place = {"row": name, "kind": kind, "candidate": number}
        ahead = requests[requests.index(request) + 1 :]
        row = journal.once(
            (events.HeldOut, events.Unscored),
            lambda p=place, r=request, a=ahead: _held_out(dispatcher.of(r, a), p, r.quantize),
        )
        journal.expect(row, **place, quantized=request.quantize)
        if isinstance(row, events.Scored):
            check_sum(journal, row, {task.name: (task.weight, task.metric) for task in tasks})
        if ask_size(experiment, state) or _changed(state, resumed):
            return False
    return True


def _heldout_candidates(state: RunState, best: Trial) -> list[tuple[str, str, Candidate]]:
    """Return row, kind and candidate of the held-out rows, in their order."""
    rows = [
        (trial.candidate.note or origin, origin, trial.candidate)
        for origin in ("parent", "uniform")
        for trial in state.trials.values()
        if trial.score and trial.candidate.origin == origin
    ]
    if coefficient := best_coefficient(state):
        rows.append((coefficient.candidate.note, "coefficient", coefficient.candidate))
    return [*rows, ("best", "best", best.candidate)]


def best_coefficient(state: RunState) -> Trial | None:
    """Return the best start row with one weight for all models: of those that were finalists, the best by all their
    questions, as `RunState.best` is chosen.
    """
    served = state.served_finalists
    asked = served or [state.trials[number] for number in state.selected]
    score = state.as_served if served else state.as_merged
    finalists = [trial for trial in asked if trial.candidate.origin == "coefficient"]
    best = max(finalists, key=lambda trial: (-trial.violation, score(trial).total), default=None)
    return best or state.best_of("coefficient")


def _held_out(
    result: Result, place: Mapping[str, str | int | None], quantized: str
) -> events.HeldOut | events.Unscored:
    if result.score is None:
        return events.unscored(result, "heldout", quantized=quantized, **place)
    replies = {task: [*texts] for task, texts in result.score.replies.items()}
    return events.HeldOut.model_validate({**place, "replies": replies, **events.scored(result, quantized)})


def finished(state: RunState) -> events.RunFinished:
    """Return the last event; all of it follows from the events before."""
    best, rows = state.best, state.heldout
    held, failed = rows.get("best"), [*state.failed_rows]
    return events.RunFinished(
        best=best.candidate.id if best else None,
        search_score=best.value if best else None,
        violated=best.reason if best else "",
        front=[trial.candidate.id for trial in state.front],
        heldout={
            "score": held.score if held else None,
            "stderr": held.stderr if held else None,
            "rows": [row.model_dump(include=HELDOUT_FIELDS) for row in rows.values()],
            **({"failed": failed} if failed else {}),
        }
        if rows or failed
        else None,
        proposals=proposals(state),
    )


def proposals(state: RunState) -> dict[str, int]:
    """Count what became of the prompts."""
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
