"""What a pack publishes of a run's log and config, field by field."""

import builtins
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast, get_args, get_origin

import pytest
from pydantic import BaseModel

from llmevo.config import Config, parse_config
from llmevo.export.pack import SharedRun
from llmevo.models.references import ModelReference
from llmevo.run.log import events
from support.made_logs import asked, failed, folded, prompted, started, unscored, whole_run

SECRET = "jane"
"""A part of every text: of the folder that the file in it lies in."""

WITHHELD = {
    "run_started.texts.1.1",
    "resumed.texts.1.1",
    "heldout.replies.1",
    "evaluated.replies.1",
    "judged.problems",
    "judged.verdicts.reason",
    "judged.verdicts.replies",
    "presented.replies",
    "asked.candidates.unknown",
    "prompted.messages.unknown",
    "run_started.sources.unknown",
    "run_started.genes.unknown",
    "run_started.start_from.unknown",
    "run_started.config.unknown",
    "run_started.config.llm.base_url",
    "run_started.config.llm.api_key_file",
    "run_started.config.llm.api_key_env",
    "run_started.config.engine.options.1",
    "run_started.config.engine.address",
    "worker.place",
    "worker.reason",
    "run_started.config.loggers.1",
    *(
        f"run_started.config.{section}.judge.{key}"
        for section in ("tasks", "heldout")
        for key in ("base_url", "api_key_file", "api_key_env")
    ),
}
"""The places that are not published. A new field is published when `llmevo.export.pack` lists it, or is added here."""


def text(place: str) -> str:
    return f"/srv/{SECRET}/deep/{place}"


def mapping(*keys: str, **more: Any) -> dict[str, Any]:
    return {key: text(key) for key in (*keys, "unknown")} | more


TEXTS = (str, Path, Any, ModelReference)

OWN: Mapping[str, Any] = {
    "asked.candidates": [mapping("origin", "note", id=1, genes={"a/all/weight": 0.5}, recipe={"models": []})],
    "prompted.messages": [mapping("role", "content")],
    "run_started.sources": [mapping("reference", "revision", "checksum", "config", "licence")],
    "run_started.genes": [mapping("name", low=0, high=1, choices=["x"])],
    "run_started.start_from": [mapping("name", genes={"a/all/weight": 0.5})],
    "run_started.geometry": [{"name": "a"}],
    "resumed.budget": 9,
    "run_started.config.constraints": [],
    "run_started.config.search.budget": 9,
    "run_started.config.engine.workers": {"min": 1, "max": 2},
    "run_started.config.engine.on": "ray",
    "run_started.config.engine.address": "10.0.0.7:6379",
    "run_started.config.search.objective": "sum",
}
"""Values where the type says too little."""


def filled(kind: Any, place: str) -> Any:
    """A value of a type, with a text that names its place wherever there may be one."""
    if place in OWN or place.endswith(".time"):
        return OWN.get(place, "2026-01-01T00:00:00.000+00:00")
    inner: tuple[Any, ...] = get_args(kind)
    match get_origin(kind):
        case None:
            return model(kind, place) if is_model(kind) else text(place) if kind in TEXTS else kind(1)
        case types.UnionType | typing.Union:
            return filled(min(inner, key=lambda of: (not is_model(of), of not in TEXTS, of is types.NoneType)), place)
        case typing.Literal:
            return inner[0]
        case typing.Annotated:
            return filled(inner[0], place)
        case builtins.dict:
            return {"1": filled(inner[1], f"{place}.1")}
        case builtins.list:
            return [filled(inner[0], place)]
        case _:
            return [filled(of, place) for of in inner]


def is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel) and kind is not ModelReference


def model(kind: type[BaseModel], place: str) -> dict[str, Any]:
    return {
        field.alias or name: filled(cast(Any, field.annotation), f"{place}.{field.alias or name}")
        for name, field in kind.model_fields.items()
    }


def every_event() -> Iterator[dict[str, Any]]:
    kinds = {kind.model_fields["event"].default: kind for kind in get_args(get_args(events.Event)[0])}
    order = ["run_started", "asked", *(name for name in kinds if name not in ("run_started", "asked", "resumed"))]
    for name in (*order, "resumed"):
        event = model(kinds[name], name) | {"event": name}
        if name == "run_started":
            event["config"] = model(Config, "run_started.config") | {"unknown": text("x")}
        yield event


def places(value: Any, place: str) -> Iterator[str]:
    """Where the values in it stand, entries of a list as one."""
    if isinstance(value, Mapping):
        for key, part in cast(Mapping[str, Any], value).items():
            yield from places(part, f"{place}.{key}")
    elif isinstance(value, list) and value:
        for part in cast(list[Any], value):
            yield from places(part, place)
    elif value != []:
        yield place


def test_only_what_is_listed_is_published_of_every_event_and_every_key_of_the_config() -> None:
    made = [*every_event()]
    shared = SharedRun([events.EVENTS.validate_python(event) for event in made], Path("/elsewhere/root"))
    before = {place for event in made for place in places(event, event["event"])}
    after = {place for line in shared.lines for place in places(line, line["event"])}
    assert before - after == WITHHELD
    assert after - before <= {"run_started.root"}
    assert SECRET not in shared.log()
    assert SECRET not in shared.config()
    assert "/srv" not in shared.log()


def test_files_lose_their_folder_and_servers_keys_and_loggers_are_left_out() -> None:
    """A pack is read like the run: its config is a config still."""
    judged = {
        "name": "taste",
        "prompts": f"/home/{SECRET}/My prompts/a.txt",
        "judge": {"model": "gpt-4o", "rubric": "rubrics/r.txt", "api_key_file": "/k", "base_url": "http://10.0.0.7/v1"},
    }
    own = {"name": "own", "function": f"../{SECRET}/f.py:grade", "metric": "grade,none"}
    first = started(
        tasks=("words",),
        llm={"base_url": "http://10.0.0.7/v1", "model": f"/srv/{SECRET}/m", "prompts": "mine", "proposer": "local"},
        task_search_path=["tasks", f"/srv/{SECRET}/tasks"],
        loggers=[{"name": "wandb", "project": SECRET}],
        engine={"backend": "vllm", "options": {"hf_token": SECRET}},
        search={"start_from": [f"/srv/{SECRET}/best.yml", {"one/all/weight": 0.5}], "budget": "20, 5 min"},
    )
    first = first.model_copy(update={"config": {**first.config, "tasks": ["words", judged, own]}})
    reason = f"cannot read /home/{SECRET}/My prompts/a.txt"
    shared = SharedRun([first, asked(0, [0]), failed(0, reason)], Path("/elsewhere/root"))
    assert shared.state.started
    assert shared.state.started.config == {
        **{key: value for key, value in first.config.items() if key != "loggers"},
        "tasks": [
            "words",
            {**judged, "prompts": "a.txt", "judge": {"model": "gpt-4o", "rubric": "rubrics/r.txt"}},
            {**own, "function": "f.py:grade"},
        ],
        "llm": {"model": "m", "prompts": "mine", "proposer": "local"},
        "task_search_path": ["tasks", "tasks"],
        "engine": {"backend": "vllm"},
        "search": {"start_from": ["best.yml", {"one/all/weight": 0.5}], "budget": "20, 5 min"},
    }
    assert parse_config(shared.state.started.config, "pack").tasks[1].judge
    assert shared.state.trials[0].reason == "cannot read a.txt"


@pytest.mark.parametrize(
    ("written", "published"),
    [
        (f"see file:///home/{SECRET}/x.bin", "see x.bin"),
        (f"file://host/{SECRET}/x", "x"),
        (f"FILE:///srv/{SECRET}/x", "x"),
        (f"→/srv/{SECRET}/deep/x.bin!", "→x.bin!"),
        (f"#/srv/{SECRET}/x:12", "#x:12"),
        (f"/srv/{SECRET}'s/x/y", "y"),
        (f"/srv/{SECRET}/{{a}}/(b)/c&d", "c&d"),
        (f"/srv/{SECRET}\\ and\\ more/x", "x"),
        (f"</srv/{SECRET}/x>", "<x>"),
        (f"../{SECRET}/models/x", "x"),
        (f"a/../../{SECRET}/x", "a/x"),
        ("</b> https://host/a/b one/all/weight ./models/x and/or /one, ~/x or b/c", None),
    ],
)
def test_places_in_free_text_are_withheld(written: str, published: str | None) -> None:
    shared = SharedRun([started(), asked(0, [0]), failed(0, written)], Path("/elsewhere/root"))
    assert shared.state.trials[0].reason == (published or written)


def test_a_model_outside_the_runs_folder_is_published_without_its_place() -> None:
    first = started()
    sources = [{**source, "reference": f"../../{SECRET}/deep/models/{source['reference']}"} for source in first.sources]
    shared = SharedRun([first.model_copy(update={"sources": sources})], Path("/elsewhere/root"))
    assert [source["reference"] for source in shared.lines[0]["sources"]] == ["./models/one", "./models/two"]
    assert shared.local == ["./models/one", "./models/two"]
    assert SECRET not in shared.log()


def test_a_reply_that_a_failure_quotes_is_left_out_there_and_in_the_prompts_that_repeat_it() -> None:
    reason = "gate: of 8 short replies 5 are degenerate (5 empty), such as 'a reply of the model'"
    told_so = f"FAILED #5: {reason[:70]}\nFAILED #6: {reason}\nBEST #4"
    log = [*whole_run()[:6], prompted(1), asked(1, [3]), failed(3, reason)]
    log.append(prompted(2).model_copy(update={"messages": [{"role": "user", "content": told_so}]}))
    shared = SharedRun(log, Path("/elsewhere/root"))
    assert "a reply" not in shared.log()
    assert shared.state.trials[3].reason == "gate: of 8 short replies 5 are degenerate (5 empty), such as …"
    said = shared.state.prompted[1].messages[0]["content"].splitlines()
    assert said == [f"FAILED #5: {reason[:61]}…", f"FAILED #6: {reason[:61]}…", "BEST #4"]


def test_a_reply_that_a_failure_of_the_finals_quotes_is_left_out() -> None:
    reason = "gate: of 8 short replies 5 are degenerate (5 empty), such as 'a reply of the model'"
    shared = SharedRun([*whole_run()[:-1], unscored("base", "base", reason)], Path("/elsewhere/root"))
    assert "a reply" not in shared.log()
    assert shared.state.failed_rows["base"].reason.endswith("such as …")


def test_questions_and_replies_that_a_prompt_quotes_are_left_out() -> None:
    told = "EXAMPLES\n> Question: what is 1 + 1? 2\n5 > 4\n> said 3\nANSWER"
    log = [*whole_run()[:6], prompted(1).model_copy(update={"messages": [{"role": "user", "content": told}]})]
    said = SharedRun(log, Path("/elsewhere/root")).state.prompted[-1].messages[0]["content"]
    assert said == "EXAMPLES\n> …\n5 > 4\n> …\nANSWER"


@pytest.mark.parametrize(
    ("key", "before", "now", "published"),
    [
        ("config.llm.api_key_file", "/k/one", "/k/two", None),
        ("config.loggers", [], ["wandb"], None),
        ("config.llm.model", "/srv/jane/m", None, ("config.llm.model", "m", None)),
        ("config.llm.transcript", None, "/srv/jane/run", ("config.llm.transcript", None, "run")),
        ("config.task_search_path", ["/srv/jane/t"], ["t"], ("config.task_search_path", ["t"], ["t"])),
        ("sources./srv/models/one.checksum", "ab", "cd", ("sources../models/one.checksum", "ab", "cd")),
        ("questions.search", "ab", "cd", ("questions.search", "ab", "cd")),
    ],
)
def test_a_change_that_was_forced_is_published_as_its_key_in_the_config_is(
    key: str, before: Any, now: Any, published: tuple[str, Any, Any] | None
) -> None:
    first = started()
    sources = [{**source, "reference": f"/srv/models/{source['reference']}"} for source in first.sources]
    first = first.model_copy(update={"sources": sources})
    forced = events.Resumed(reason="--force", forced=[events.Change(key=key, before=before, now=now)])
    line = SharedRun([first, forced], Path("/elsewhere/root")).lines[1]
    assert [tuple(change.values()) for change in line["forced"]] == ([published] if published else [])


def test_a_run_with_votes_is_shared_without_the_replies_and_read_again() -> None:
    shown = [events.Presented(task="taste", poll="p", player=name, replies=[f"{name} writes"]) for name in ("x", "y")]
    vote = events.Voted(task="taste", poll="p", player="y", other="x", prompt=0, choice="own")
    log: list[events.Event] = [started(), *shown, vote]
    shared = SharedRun(log, Path("/elsewhere/root"))
    assert "writes" not in shared.log()
    assert shared.state.verdicts.standing("taste") == folded(log).verdicts.standing("taste") != 0.5
