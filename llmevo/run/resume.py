"""Resume a run: changes since its start are refused, or allowed and logged; the budget may be another."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llmevo.config import Budget, Config, check_values, parse_logged, read_config, with_places
from llmevo.errors import ConfigError, RunError, plural
from llmevo.run import trust
from llmevo.run.experiment import Experiment, config_of
from llmevo.run.log import changes, events
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import LOG, RunLog
from llmevo.run.spending import Spending
from llmevo.run.versions import versions

if TYPE_CHECKING:  # see `Experiment`
    from llmevo.run.scorer import Scorer

CONFIG = "config.yml"
"""The copy of the config file in a run's folder."""

OPTIONS = (
    "search.optimizer",
    "search.budget",
    "search.seed",
    "search.evaluation_seed",
    "llm.base_url",
    "llm.model",
    "llm.mask_names",
    "llm.max_calls",
    "llm.max_cost",
    "llm.strict",
    "engine.backend",
    "task_search_path",
)
"""Keys of the config that `llmevo run` has options for, or that `llmevo compare` sets."""

SUBJECTS = {"config": "the config", "questions": "the questions, their format or the engine", "sources": "a model"}
"""The subject of a changed fact, by the first part of its key."""


def prepare(
    log: RunLog,
    given: Config | None = None,
    root: Path | None = None,
    budget: Budget | None = None,
    force: bool = False,
    api_key: str | None = None,
    trusted: bool = False,
    warn: Callable[[str], None] = lambda _: None,
    workers: int | Literal["auto"] | None = None,
) -> Experiment:
    """Return the experiment of an opened log, with the changes since its start appended to the log.

    `given`, with the `root` of its paths, is the user's config; without it the log's counts. Where the workers run is
    not logged: `given` says it for this session, and `workers` their number.

    Raises RunError where the config, the questions or the models are not those of the log, unless `force` allows it,
    and for a log from elsewhere without the user's consent (see `llmevo.run.trust`); ConfigError for a budget that is
    spent already.
    """
    from llmevo.run.scorer import Scorer

    state = RunState.fold(iter(log.recorded))
    if state.started is None and log.recorded:
        raise RunError(f"{log.folder}/{LOG}: the first event is missing; the log has been changed. Start another run")
    if state.started is None:
        raise RunError(f"{log.folder}: was stopped before its first event; start it with `llmevo run` as before")
    check_values(state.started.config, f"{log.folder}/{LOG}")
    trust.check(log.recorded, log.folder, trusted, given, root)
    begun = next(event for event in log.recorded if isinstance(event, events.RunStarted))
    before = parse_logged(state.started.config, f"{log.folder}/{LOG}")
    found = _config_changes(log, before, given or before)
    edited = [] if given else _edited(log, [begun, state.started], warn)
    raised = _new_budget(before, given or before, budget, state)
    now = changes.applied(state.started, events.Resumed(reason="", forced=found, budget=raised))
    placed = _placed(config_of(now, LOG), begun, given, workers)
    scorer = Scorer(placed, root or log.place / begun.root, warn=warn)
    goes_on = not state.finished or raised is not None
    if goes_on:
        if edited and not force:
            raise RunError(
                f"{log.folder}/{CONFIG} has changed since the run began, and a run goes on as its log says:\n"
                f"{changes.table(edited)}\nchange that back; or go on as the log says, with --force"
            )
        found += changed_facts(scorer, state.started)
    if found and not force:
        raise RunError(refused(log.folder, found, "--force goes on all the same, and the log will say so"))
    if goes_on and (event := _resumed(state.started, found, raised, scorer)):
        log.append(event)
        log.recorded.append(event)
    if goes_on and not begun.order and (count := scorer.count_workers()) > 1:
        warn(
            "The run began without workers, so its candidates go on one after the other; only finalists and held-out"
            f" rows are scored {count} at a time"
        )
    experiment = Experiment.of_log(begun, log.folder, api_key)
    experiment.root, experiment.verdicts, experiment.scorer = scorer.root, scorer.verdicts, scorer
    return experiment


def _placed(
    config: Config, begun: events.RunStarted, given: Config | None, workers: int | Literal["auto"] | None
) -> Config:
    """Return the config with the workers of this session; a run that began without any gets them only when asked."""
    places = (given or config).engine.model_dump(mode="json", include={*changes.PLACES})
    if workers is not None:
        places["workers"] = workers
    elif not begun.order and places.get("workers", "auto") == "auto":
        places["workers"] = 1
    return with_places(config, **places)


def _config_changes(log: RunLog, before: Config, now: Config) -> list[events.Change]:
    """The changes of the config but for the budget. Raises RunError for those that no option allows."""
    one, other = (changes.config_facts(config.model_dump(mode="json")) for config in (before, now))
    found = [change for change in changes.differences(one, other) if change.key != changes.BUDGET]
    if fixed := [change for change in found if changes.is_fixed(change)]:
        way_out = f"to go on, give the old value; or begin another run with `start_from: [{log.folder}/best.yml]`"
        raise RunError(refused(log.folder, fixed, f"the candidates so far depend on it: {way_out}"))
    return found


def _edited(log: RunLog, known: Sequence[events.RunStarted], warn: Callable[[str], None]) -> list[events.Change]:
    """The values of the config in the run's folder that are in none of the `known` starts; a warning where it cannot be
    read, and where an option of the command line may have replaced its value.
    """
    if not (log.place / CONFIG).exists():
        return []
    try:
        written = changes.config_facts(read_config(log.place / CONFIG).model_dump(mode="json"))
    except ConfigError as error:
        reason = str(error).splitlines()[0].removeprefix(f"{log.place / CONFIG}: ")
        warn(f"{log.folder}/{CONFIG} cannot be read ({reason}): changes in it do not count, the log does")
        return []
    logged = [changes.config_facts(parse_logged(of.config, LOG).model_dump(mode="json")) for of in known]
    found = [
        change
        for change in changes.differences(logged[-1], written)
        if change.now not in [of.get(change.key) for of in logged]
    ]
    options = [change for change in found if change.key.removeprefix("config.") in OPTIONS]
    if options:
        warn(f"{log.folder}/{CONFIG} differs from the log, which counts:\n{changes.table(options)}")
    return [change for change in found if change not in options]


def refused(folder: Path, found: Sequence[events.Change], way_out: str) -> str:
    """Return the text of an error: what has changed since the run in a folder began."""
    kinds = dict.fromkeys(SUBJECTS[change.key.partition(".")[0]] for change in found)
    return f"{folder}: {' and '.join(kinds)} has changed since the run began:\n{changes.table(found)}\n{way_out}"


def _new_budget(before: Config, given: Config, budget: Budget | None, state: RunState) -> int | dict[str, float] | None:
    """A changed budget, in the form of the config. Raises ConfigError where it is below the spending, or below the
    candidates that are asked for.
    """
    new = budget or given.search.budget
    if new == before.search.budget:
        return None
    if "evaluations" in new.bounds and new.evaluations < (asked := len(state.candidates)) > len(state.trials):
        raise ConfigError(
            f"search.budget: {new} is too low, for the run has asked for {plural(asked, 'candidate')}; give {asked} or"
            " more"
        )
    spending = Spending(new, state)
    if over := [kind for kind, left in spending.left.items() if left < 0]:
        kind, spent = over[0], spending.spent[over[0]]
        done = f"scored {plural(int(spent), 'candidate')}" if kind == "evaluations" else f"spent {spent:,.6g} {kind}"
        raise ConfigError(f"search.budget: {new} is too low, for the run has {done}; give more than {spent:,.6g}")
    return new.model_dump(mode="json")


def recorded_facts(started: events.RunStarted) -> changes.Facts:
    """Return the questions and models of a run's start."""
    return {**changes.question_facts(started.questions), **changes.source_facts(started.sources)}


def current_facts(scorer: "Scorer", started: events.RunStarted) -> changes.Facts:
    """Return the questions and models as they are now; reads them, and loads no engine."""
    return {**changes.question_facts(scorer.questions), **_current_sources(scorer, started)}


def changed_facts(scorer: "Scorer", started: events.RunStarted) -> list[events.Change]:
    """Return the questions and models that are not those of the run, search questions in another order, and other
    answers to the same questions; reads them, and loads no engine.
    """
    found = changes.differences(recorded_facts(started), current_facts(scorer, started))
    told = {change.key for change in found}
    texts = {name: evaluator.texts() for name, evaluator in scorer.evaluators.items()}
    same = {name: asked for name, asked in texts.items() if f"questions.{name}" not in told}
    return found + changes.reordered(started, texts["search"]) + changes.answered(started, same)


def changed_models(scorer: "Scorer", started: events.RunStarted) -> list[events.Change]:
    """Return the models whose revision, checksum or tokens are not those of the run; reads the models."""
    found = changes.differences(changes.source_facts(started.sources), _current_sources(scorer, started))
    if started.vocabulary and started.vocabulary != scorer.vocabulary:
        key = f"sources.{scorer.config.genome.references[0]}.vocabulary"
        found.append(events.Change(key=key, before=started.vocabulary, now=scorer.vocabulary))
    return found


def _current_sources(scorer: "Scorer", started: events.RunStarted) -> changes.Facts:
    """The models as they are now, with checksums by the rule of the run."""
    recorded = {source["reference"]: source for source in started.sources}
    sources = [
        {
            "reference": str(r),
            "revision": (r.lora or r.model).revision,
            "checksum": scorer.checksum_as(r, recorded.get(str(r), {}).get("checksum", "")),
            **({"config": scorer.sources.config_digest(r)} if "config" in recorded.get(str(r), {}) else {}),
        }
        for r in scorer.config.genome.references
    ]
    return changes.source_facts(sources)


def _resumed(
    started: events.RunStarted,
    found: Sequence[events.Change],
    raised: int | dict[str, float] | None,
    scorer: "Scorer",
) -> events.Resumed | None:
    """The event of the changes; None where there are none."""
    here = versions()
    others = {name: here[name] for name, old in started.versions.items() if here.get(name, old) != old}
    reasons = [
        f"budget {Budget.model_validate(raised)}" if raised is not None else "",
        f"--force in spite of {len(found)} changes" if found else "",
        f"other versions of {', '.join(others)}" if others else "",
    ]
    if not any(reasons):
        return None
    asked = scorer.evaluators if any(change.key.startswith(("questions.", "sources.")) for change in found) else {}
    return events.Resumed(
        reason="; ".join(filter(None, reasons)),
        budget=raised,
        forced=[*found],
        counts={name: evaluator.items for name, evaluator in asked.items()},
        texts={name: evaluator.texts() for name, evaluator in asked.items()},
        clusters={name: evaluator.clusters for name, evaluator in asked.items()},
        groups={name: evaluator.groups for name, evaluator in asked.items()},
        versions=others,
    )
