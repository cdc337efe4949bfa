"""Differences between a run as it began and as it is resumed: its config, its questions, its models.

Facts are the places in `run_started` that decide scores and candidates, by dotted keys: `config.llm.model`,
`questions.search`, `sources.MODEL.checksum`.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from llmevo.errors import without_passwords
from llmevo.evaluation.questions import Texts
from llmevo.run.log import events

SECTIONS = ("genome", "search", "llm", "engine")
"""Parts of a config whose keys count one by one."""

FIXED = (
    "genome",
    "search",
    "tasks",
    "heldout",
    "constraints",
    "split",
    "random_init",
    "engine.quantize",
    "engine.quantize_at",
    "llm.mask_names",
    "llm.prompts",
    "llm.proposer",
)
"""Keys of the config that the candidates so far depend on; other values need a new run."""

PLACES = ("workers", "on", "address", "gpus_per_worker")
"""Keys of `engine` that say where workers run: no score and no candidate depends on them once a run has begun."""

BUDGET = "config.search.budget"

SHOWN = 40
"""Characters that are shown of a question with another answer, its end, and of the answer."""

FEW = 3
"""Questions with another answer that are shown, at most."""

Facts = Mapping[str, Any]


def config_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts of a config, given as `Config.model_dump(mode="json")`."""
    facts: dict[str, Any] = {}
    for key, value in config.items():
        if key == "loggers":  # nothing depends on it
            continue
        if key == "engine":
            value = {name: part for name, part in value.items() if name not in PLACES}
        inner: dict[str, Any] = {f"{key}.{name}": part for name, part in value.items()} if key in SECTIONS else {}
        facts |= {f"config.{name}": part for name, part in (inner or {key: value}).items()}
    return facts


def source_facts(sources: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the facts of the models, given as in `run_started`; older logs have none of their configs."""
    return {
        f"sources.{source['reference']}.{kind}": source[kind]
        for source in sources
        for kind in ("revision", "checksum", "config")
        if kind in source
    }


def question_facts(questions: Mapping[str, str]) -> dict[str, Any]:
    """Return the facts of the questions, given as digests."""
    return {f"questions.{name}": digest for name, digest in questions.items()}


def reordered(started: events.RunStarted, now: Texts) -> list[events.Change]:
    """Return the change when the same search questions have another order: scores are compared question by question.

    `now` is {task: (question, answer) of each}.
    """
    before = started.texts.get("search", {})
    one, other = ({task: [*map(list, asked)] for task, asked in texts.items()} for texts in (before, now))
    same = {task: sorted(asked) for task, asked in one.items()} == {task: sorted(q) for task, q in other.items()}
    orders = [hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest() for texts in (one, other)]
    known = started.questions.get("order", orders[0])
    return [events.Change(key="questions.order", before=known, now=orders[1])] if same and known != orders[1] else []


def answered(started: events.RunStarted, now: Mapping[str, Texts]) -> list[events.Change]:
    """Return a change for each set of questions that has other answers, or other choices in its texts; digests are of
    lm-eval's own question texts, which have neither.

    `now` is {set: {task: (question, answer) of each}}. The texts of older logs may have other forms of a question.
    """
    found: list[events.Change] = []
    for name, texts in now.items():
        one, other = (_pairs(asked) for asked in (started.texts.get(name, {}), texts))
        same = Counter(pair[:2] for pair in one.elements()) == Counter(pair[:2] for pair in other.elements())
        if one and one != other and (same or started.rules >= 5):
            before, after = (
                {f"{task}: {text[-SHOWN:]}": answer[:SHOWN] for task, text, answer in islice(pairs, FEW)}
                for pairs in (one - other, other - one)
            )
            found.append(events.Change(key=f"questions.{name}.answers", before=before, now=after))
    return found


def _pairs(asked: Texts) -> Counter[tuple[str, str, str]]:
    return Counter((task, question, answer) for task, pairs in asked.items() for question, answer in pairs)


def differences(before: Facts, now: Facts) -> list[events.Change]:
    """Return the facts that differ; those that one side lacks are not compared."""
    return [
        events.Change(key=key, before=value, now=now[key])
        for key, value in before.items()
        if key in now and now[key] != value
    ]


def is_fixed(change: events.Change) -> bool:
    """Whether `--force` cannot allow the change."""
    key = change.key.removeprefix("config.")
    return key != change.key and any(key == fixed or key.startswith(f"{fixed}.") for fixed in FIXED)


def table(changes: Sequence[events.Change]) -> str:
    """Format the changes, one line each."""
    return "\n".join(f"  {c.key}: {_difference(c.before, c.now)}" for c in changes)


def _difference(before: Any, now: Any) -> str:
    """Both values; of lists with entries in common only what was removed and added."""
    if isinstance(before, list) and isinstance(now, list):
        removed, added = ([of for of in some if of not in others] for some, others in ((before, now), (now, before)))
        parts = [f"{', '.join(map(_short, of))} {word}" for of, word in ((removed, "removed"), (added, "added")) if of]
        if parts and len(removed) < len(before):
            return ", ".join(parts)
    return f"{_short(before)} before, {_short(now)} now"


def applied(started: events.RunStarted, resumed: events.Resumed) -> events.RunStarted:
    """Return the beginning of a run with the changes of a `resumed` event."""
    changes = {change.key: change.now for change in resumed.forced}
    if resumed.budget is not None:
        changes[BUDGET] = resumed.budget
    config, questions = {**started.config}, {**started.questions}
    sources = [
        {**source, **{k: changes.get(f"sources.{source['reference']}.{k}", v) for k, v in source.items()}}
        for source in started.sources
    ]
    for key, value in changes.items():
        kind, _, name = key.partition(".")
        if kind == "config":
            section, _, inner = name.partition(".")
            config[section] = {**(config.get(section) or {}), inner: value} if inner else value
        elif kind == "questions":
            questions[name] = value
    versions = {**started.versions, **resumed.versions}
    update: dict[str, Any] = {"config": config, "questions": questions, "sources": sources, "versions": versions}
    if counts := resumed.counts:
        questions = {name: of for name, of in questions.items() if name != "order" and not name.endswith(".answers")}
        sizes = {"heldout_items": counts.get("heldout", 0), "selection_items": counts.get("selection", 0)}
        update |= {"items": counts.get("search", started.items), **sizes}
        update |= {"texts": resumed.texts, "clusters": resumed.clusters, "groups": resumed.groups}
    return started.model_copy(update=update)


def _short(value: Any) -> str:
    text = without_passwords(repr(value))
    return text if len(text) <= 80 else f"{text[:60]}…{text[-15:]}"
