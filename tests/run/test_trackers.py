"""What is sent to wandb, TensorBoard and MLflow, each by its own package; and that none of them hurts a run."""

import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from llmevo.config import parse_config
from llmevo.errors import ConfigError
from llmevo.merging.recipe import Recipe
from llmevo.run import trackers
from llmevo.run.log import events
from llmevo.run.log.state import RunState
from llmevo.run.trackers import LOGGERS, About, about_run, check_installed, forwarded
from support.made_logs import whole_run
from support.workspace import Workspace

KEY = "sk-very-secret-0123456789"


def send(log: Sequence[events.Event], entries: Sequence[Mapping[str, Any]], folder: Path) -> list[str]:
    """Send a log as a run does; what it warns of."""
    warnings: list[str] = []
    folder.mkdir(exist_ok=True)

    def warn(text: str) -> None:
        time.sleep(0.1)  # the run waits until it is said
        warnings.append(text)

    with forwarded(entries, folder, warn) as observers:
        state = RunState()
        for event in log:
            state.apply(event)
            for observer in observers:
                observer(event, state)
    return warnings


class Memory:
    """A logger that remembers, in place of a package."""

    opened: "list[Memory]"

    def __init__(self, run: About, held: int = 0) -> None:
        self.run, self.events = run, held
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.texts: list[tuple[int, str, str]] = []
        self.closed: bool | None = None
        Memory.opened.append(self)

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        self.rows.append((step, {**values}))

    def text(self, name: str, text: str, step: int) -> None:
        self.texts.append((step, name, text))

    file = text

    def close(self, finished: bool) -> None:
        self.closed = finished


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> list[Memory]:
    Memory.opened = []
    monkeypatch.setattr(trackers, "LOGGERS", {"memory": Memory})
    return Memory.opened


def test_every_event_is_sent_in_its_order(memory: list[Memory], tmp_path: Path) -> None:
    log = whole_run()
    assert send(log, [{"name": "memory"}], tmp_path / "run") == []
    (logger,) = memory
    assert logger.closed is True
    assert [row["events"] for _, row in logger.rows] == [*range(1, len(log) + 1)]
    fifth = next((step, row) for step, row in logger.rows if row.get("score") == 0.8)
    assert fifth[0] == 5
    assert fifth[1]["best"] == 0.8
    assert fifth[1]["tasks/q_words_search/acc"] == 0.8
    assert fifth[1]["genes/one/all/weight"] == 0.5
    flat = {name: value for _, row in logger.rows for name, value in row.items()}
    assert (flat["step_size"], flat["trust"], flat["failures"], flat["generation"]) == (0.21, 0.4, 1, 2)
    assert (flat["llm/proposals"], flat["llm/prompt_tokens"], flat["llm/cost"]) == (2, 100, 0.01)
    assert (flat["heldout/best/score"], flat["heldout/best/q_family_heldout/acc"]) == (0.7, 0.7)
    assert (3, "llm/thought", "Words want more of two.") in logger.texts
    assert (6, "failure", "#5: the merge is not finite") in logger.texts
    recipes = [(step, text) for step, name, text in logger.texts if name == "best.yml"]
    assert [step for step, _ in recipes] == [1, 2, 3, 4, 5]
    assert "weight: 0.04" in recipes[-1][1]


def test_the_best_that_the_selection_questions_choose_is_sent_too(memory: list[Memory], tmp_path: Path) -> None:
    *searched, last = whole_run()
    tasks = {"q_words_search": {"acc": 0.9}, "q_family_search": {"acc": 0.9}}
    given: dict[str, Any] = {"generation": 3, "finalists": 2, "stderr": 0.01, "tasks": tasks, "items": 2000}
    chosen = [
        events.Selected(candidate=number, score=score, seconds={"evaluate": 1.0}, **given)
        for number, score in ((4, 0.1), (3, 0.9))
    ]
    log = [*searched, *chosen, last]
    best = RunState.fold(iter(log)).best
    assert best
    assert best.candidate.id == 3
    send(log, [{"name": "memory"}], tmp_path / "run")
    (logger,) = memory
    kept = {name: text for _, name, text in logger.texts}
    assert kept["best"].startswith("#3 from llm")
    recipe = RunState.fold(iter(log)).recipes[3]
    assert kept["best.yml"] == Recipe.model_validate(recipe).to_yaml()


def test_what_an_earlier_process_has_sent_is_not_sent_again(memory: list[Memory], tmp_path: Path) -> None:
    log = whole_run()
    send(log, [{"name": "memory", "held": 10}], tmp_path / "run")
    assert [row["events"] for _, row in memory[0].rows] == [*range(11, len(log) + 1)]


def test_a_run_that_was_stopped_is_closed_unfinished_and_keeps_its_id(memory: list[Memory], tmp_path: Path) -> None:
    log = whole_run()
    for part in (log[:8], log):
        send(part, [{"name": "memory"}], tmp_path / "my run")
    assert [logger.closed for logger in memory] == [False, True]
    assert memory[0].run.id == memory[1].run.id
    assert memory[0].run.id.startswith("my-run-20")
    other = [log[0].model_copy(update={"time": "2026-01-01T00:00:00.001+00:00"}), *log[1:]]
    send(other, [{"name": "memory"}], tmp_path / "my run")
    assert memory[2].run.id == "my-run-20260101000000001"


@pytest.mark.parametrize("where", ["__init__", "numbers", "text", "close"])
@pytest.mark.parametrize("error", [ValueError("no\nway"), SystemExit(3)])
@pytest.mark.usefixtures("memory")
def test_a_logger_that_fails_costs_one_warning(
    where: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Memory, where, fails)
    (warning,) = send(whole_run(), [{"name": "memory"}], tmp_path / "run")
    assert warning.startswith("The logger memory is off, the run goes on without it: ")
    assert type(error).__name__ in warning
    assert "\n" not in warning


@pytest.mark.parametrize("where", ["__init__", "numbers", "close"])
@pytest.mark.usefixtures("memory")
def test_a_logger_that_hangs_costs_the_patience_and_no_more(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = threading.Event()
    monkeypatch.setattr(Memory, where, lambda *_, **__: end.wait())
    monkeypatch.setattr(trackers, "QUEUE_SIZE", 5)
    warnings: list[str] = []
    with forwarded([{"name": "memory"}], tmp_path, warnings.append, patience=0.2) as (observe,):
        state = RunState()
        for event in whole_run():
            state.apply(event)
            observe(event, state)
    assert len(warnings) == 1
    assert len(state.trials) == 9
    end.set()


def test_one_that_fails_does_not_stop_the_others(memory: list[Memory], tmp_path: Path) -> None:
    entries = [{"name": "memory", "nonsense": 1}, {"name": "memory"}]
    (warning,) = send(whole_run(), entries, tmp_path / "run")
    assert "TypeError" in warning
    assert memory[-1].closed is True


# --- the packages themselves, offline -----------------------------------------------------------------------------


def test_tensorboard_shows_a_run_once_although_it_was_resumed(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log, run = whole_run(), tmp_path / "run"
    for part in (log[:9], log):
        assert send(part, [{"name": "tensorboard"}], run) == []
    read = accumulator.EventAccumulator(str(run / "tensorboard"), {"scalars": 0, "tensors": 0})
    read.Reload()
    assert [(e.step, round(e.value, 4)) for e in read.Scalars("score")] == [
        (step, score)
        for step, score in zip((1, 2, 3, 4, 5, 7, 8, 9), (0.3, 0.35, 0.4, 0.5, 0.8, 0.45, 0.45, 0.45), strict=True)
    ]
    assert [round(e.value, 2) for e in read.Scalars("tasks/q_words_search/acc")][4] == 0.8
    assert [round(e.value, 2) for e in read.Scalars("heldout/best/score")] == [0.7]
    assert [e.value for e in read.Scalars("failures")] == [1]
    thought = read.Tensors("llm/thought/text_summary")[0].tensor_proto.string_val[0]
    assert thought == b"Words want more of two."
    assert b"merge_method: linear" in read.Tensors("best.yml/text_summary")[-1].tensor_proto.string_val[0]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of MLflow's own doing
def test_mlflow_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database takes seconds to make its tables
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    store = (tmp_path / "store").as_uri()
    log, entry = whole_run(), {"name": "mlflow", "tracking_uri": store, "experiment": "merges"}
    client: Any = mlflow.MlflowClient(store)
    client.create_experiment("merges", artifact_location=str(tmp_path / "artifacts"))
    for part, status in ((log[:9], "KILLED"), (log, "FINISHED")):
        assert send(part, [entry], tmp_path / "run") == []
        (run,) = client.search_runs([client.get_experiment_by_name("merges").experiment_id])
        assert run.info.status == status
    history = client.get_metric_history(run.info.run_id, "score")
    assert [(m.step, m.value) for m in history][:5] == [(1, 0.3), (2, 0.35), (3, 0.4), (4, 0.5), (5, 0.8)]
    assert len(history) == 8
    assert run.data.metrics["heldout/best/score"] == 0.7
    assert run.data.metrics["tasks/q_words_search/acc"] == 0.45
    assert run.data.params["genome.merge_method"] == "linear"
    assert "weight: 0.04" in mlflow.artifacts.load_text(f"{run.info.artifact_uri}/best.yml")
    assert mlflow.artifacts.load_text(f"{run.info.artifact_uri}/llm/thought/00003.txt") == "Words want more of two."
    place = next(number for number, event in enumerate(log) if isinstance(event, events.Prompted))
    again = [*log[: place + 1], log[place].model_copy(update={"analysis": "It is repaired."})]
    assert send(again, [entry], tmp_path / "other") == []
    (other,) = client.search_runs([client.get_experiment_by_name("merges").experiment_id], "run_name = 'other'")
    first, second = (f"{other.info.artifact_uri}/llm/thought/00003{end}.txt" for end in ("", "-2"))
    assert [*map(mlflow.artifacts.load_text, (first, second))] == ["Words want more of two.", "It is repaired."]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def wandb_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows in an offline run's file: LevelDB's log format, in it protobuf records."""
    from wandb.proto import wandb_internal_pb2

    record_of: Any = vars(wandb_internal_pb2)["Record"]
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    until = time.monotonic() + 60
    while file.stat().st_size <= 7 and time.monotonic() < until:  # wandb's own process writes it a moment later
        time.sleep(0.1)
    content, place, whole, rows = file.read_bytes(), 7, b"", list[dict[str, Any]]()
    while place + 7 <= len(content):
        if (room := 32768 - place % 32768) < 7:
            place += room
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        part, place = content[place + 7 : place + 7 + length], place + 7 + length
        whole = part if kind in (1, 2) else whole + part  # whole, first, middle, last
        if kind not in (1, 4):
            continue
        record = record_of.FromString(whole)
        if record.HasField("history"):
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
    return rows


@pytest.mark.usefixtures("offline")
def test_wandb_takes_all_of_it_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run, entry = tmp_path / "run", {"name": "wandb", "mode": "offline", "project": "merges"}
    assert send(whole_run(), [entry], run) == []
    rows = wandb_rows(run)
    flat = {name: value for row in rows for name, value in row.items()}
    assert [row["score"] for row in rows if "score" in row] == [0.3, 0.35, 0.4, 0.5, 0.8, 0.45, 0.45, 0.45]
    assert flat["llm/thought"] == "Words want more of two."
    assert flat["failure"] == "#5: the merge is not finite"
    assert (flat["trust"], flat["heldout/best/score"], flat["genes/one/all/weight"]) == (0.4, 0.7, 0.5)
    (name,) = [path.name for path in run.glob("wandb/offline-run-*/*.wandb")]
    started = whole_run()[0]
    assert isinstance(started, events.RunStarted)
    assert name.startswith("run-run-20")


@pytest.mark.usefixtures("offline")
def test_wandb_without_a_login_asks_nobody_and_is_off(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    (warning,) = send(whole_run(), [{"name": "wandb"}], tmp_path / "run")
    assert "not logged in; use `wandb login`" in warning


@pytest.mark.usefixtures("offline")
def test_a_run_and_its_resume_tell_their_loggers_and_no_key(workspace: Workspace) -> None:
    pytest.importorskip("wandb")
    workspace.monkeypatch.setenv("WANDB_MODE", "offline")
    workspace.monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}-of-the-environment")
    config = workspace.config(loggers=["tensorboard"])
    words = ("--out", "run", "--logger", "wandb", "--api-key", KEY)
    assert workspace.llmevo("run", config, *words, "--budget", 4)[0] == 0
    status, printed = workspace.llmevo("resume", "run", "--budget", 6)
    assert (status, "is off" in printed) == (0, False)
    assert [entry["name"] for entry in workspace.state("run").started.config["loggers"]] == ["tensorboard", "wandb"]  # pyright: ignore
    files = [file for file in workspace.root.rglob("*") if file.is_file() and file.suffix != ".safetensors"]
    assert {"tensorboard", "wandb"} <= {part for file in files for part in file.relative_to(workspace.root).parts}
    assert [file for file in files if KEY.encode() in file.read_bytes()] == []


# --- configs ------------------------------------------------------------------------------------------------------

BARE: dict[str, Any] = {"genome": {"models": ["a", "b"], "merge_method": "linear"}, "tasks": [{"name": "t"}]}


def test_a_config_names_loggers_with_or_without_options() -> None:
    given = ["tensorboard", {"name": "wandb", "project": "merges"}]
    assert parse_config({**BARE, "loggers": given}, "c").loggers == [{"name": "tensorboard"}, given[1]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["wandbb"], "did you mean 'wandb'"),
        ([{"name": "wandb", "projct": "x"}], "wandb has no option 'projct', did you mean 'project'"),
        ([{"project": "x"}], "known: wandb, tensorboard, mlflow"),
        (["wandb", {"name": "wandb"}], "listed twice"),
    ],
)
def test_a_logger_that_cannot_be_is_refused_with_the_way_out(given: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=r"^c: loggers: ") as caught:
        parse_config({**BARE, "loggers": given}, "c")
    assert message in str(caught.value)


def test_a_missing_package_is_told_before_anything_starts(workspace: Workspace) -> None:
    workspace.monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    status, printed = workspace.llmevo("run", workspace.config(), "--out", "run", "--logger", "mlflow")
    assert (status, "pip install '.[mlflow]'" in printed, Path("run").exists()) == (2, True, False)
    status, printed = workspace.llmevo("run", workspace.config(), "--out", "run", "--logger", "nobody")
    assert (status, "--logger: logger 'nobody' is unknown" in printed) == (2, True)
    with pytest.raises(ConfigError, match=r"\.\[wandb\]"):
        check_installed([{"name": "wandb"}])


def test_the_id_of_a_run_is_short_enough_for_all_trackers(tmp_path: Path) -> None:
    begun = whole_run()[0]
    assert isinstance(begun, events.RunStarted)
    names = [about_run(begun, tmp_path / ("n" * 140 + end)).id for end in "ab"]
    assert names[0] != names[1]
    assert max(map(len, names)) <= 128 - len("-mergekit_config.yml")
    assert about_run(begun, tmp_path / "short").id.startswith("short-20")


def test_nothing_is_imported_before_it_is_used() -> None:
    code = "import llmevo.run.trackers, sys; print([n for n in ('wandb', 'mlflow', 'tensorboard') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    assert {*LOGGERS} == {"wandb", "tensorboard", "mlflow"}


def test_what_a_logger_is_told_of_the_config_opens_nothing() -> None:
    started = whole_run()[0]
    assert isinstance(started, events.RunStarted)
    secret: dict[str, Any] = {
        "llm": {"api_key_file": "/home/me/key", "base_url": "https://me:word@host"},
        "engine": {"options": {"a": 1}},
    }
    judge = {"model": "m", "base_url": "https://me:word@host", "api_key_file": "/home/me/key"}
    secret["tasks"] = [{"name": "chat", "judge": judge}]
    about = about_run(started.model_copy(update={"config": {**started.config, **secret}}), Path("run"))
    assert "'judge': {'model': 'm'}" in str(about.config["tasks"])
    assert "home" not in str(about.config)
    assert "host" not in str(about.config)
    assert about.config["search.optimizer"] == "llm"
    assert os.sep not in about.id
