"""The conclusion of a run: the gain of the merge over the best start row, on held-out questions."""

from collections.abc import Sequence

from llmevo.errors import quoted
from llmevo.reports.quantized_scores import heldout_error, served_best
from llmevo.reports.text import with_error
from llmevo.run.log.state import RunState
from llmevo.search.trial import START_ROWS


def conclusion(state: RunState, run: object = "RUN") -> Sequence[str]:
    """Return the conclusion in sentences, by held-out scores alone. `run` is the folder in suggested commands."""
    served = served_best(state)
    return [*_gain(state, run), *([str(served)] if served else [])]


def _gain(state: RunState, run: object) -> Sequence[str]:
    if (best := state.heldout.get("best")) is None:
        failed = state.failed_rows.get("best")
        return [f"The best merge has no held-out score, for it failed: {failed.reason}."] if failed else []
    rivals = [row for row in state.heldout.values() if row.kind in ("parent", "uniform", "coefficient")]
    if not rivals:
        return ["No parent and no uniform merge has a held-out score to compare the best merge with."]
    trials = {row.row: None if row.candidate is None else state.trials.get(row.candidate) for row in rivals}
    feasible = [row for row in rivals if not (trial := trials[row.row]) or not trial.violation]
    strongest = max(feasible or rivals, key=lambda row: row.score)
    gain = best.score - strongest.score
    noise = heldout_error(state, best, strongest)
    if best.candidate is not None and best.candidate == strongest.candidate:
        found = f"No merge found is better than {strongest.row}, which is the run's result"
        better = max(rivals, key=lambda row: row.score)
        if better.score <= strongest.score:
            return [f"{found}."]
        return [f"{found}, among those that keep the constraints; {better.row}, which does not, has a higher score."]
    scaled = any(row.kind == "coefficient" for row in rivals)
    those = ("parents, uniform and coefficients" if scaled else "parents and uniform") + (
        " that keep the constraints" if 0 < len(feasible) < len(rivals) else ""
    )
    against = f"{with_error(gain, noise, '+')} against {strongest.row}, the best of {those}."
    handed = state.trials[best.candidate].candidate if best.candidate in state.trials else None
    if handed and handed.origin in START_ROWS:
        name = handed.note or handed.origin
        text = (
            f"No merge that the search found is better than the start row {name}, which is the run's result."
            f" On the held-out questions {name} scores {against}"
        )
    else:
        name, text = "The best merge", f"The best merge scores {against}"
    if gain <= 0 and not feasible and not state.unmet:
        return [text, "But no parent and no uniform merge keeps the constraints."]
    if gain <= 0:
        command = f": `llmevo export {quoted(run)} OUT --candidate {strongest.candidate}`"
        apart = "." if -gain > 2 * noise else ", and within two standard errors the two cannot be told apart."
        return [
            text,
            f"{name} does not beat {strongest.row}{apart}",
            f"{strongest.row} is the simpler choice{'' if strongest.candidate is None else command}. Chosen by its"
            " held-out score, that score is no longer unbiased.",
        ]
    return [text] if gain > 2 * noise else [text, "That is within two standard errors: the gain may be luck."]
