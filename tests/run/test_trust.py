"""A log from elsewhere is data: nothing that it names is executed, opened or contacted unless its reader agrees."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llmevo.config import parse_config
from llmevo.errors import RunError
from llmevo.run.log.storage import LOG, RunLog, is_own, read_log
from llmevo.run.trust import uses
from llmevo.run.verify import verify
from support.fake_server import serving
from support.workspace import Workspace

GOLDEN = Path(__file__).parents[1] / "golden"

CODE = """\
from pathlib import Path
Path("touched").touch()
def measure(question, reply):
    return 1.0
"""


@pytest.fixture(autouse=True)
def _nothing_trusted_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def edited(run: Path, kind: str = "run_started", **fields: Any) -> None:
    """Change fields of the first event of a kind in a run's log; `config` is merged into the one there."""
    lines = [json.loads(line) for line in (run / LOG).read_text().splitlines()]
    event = next(line for line in lines if line["event"] == kind)
    if "config" in fields:
        fields["config"] = {**event["config"], **fields["config"]}
    event.update(fields)
    (run / LOG).write_text("".join(json.dumps(line) + "\n" for line in lines))


def golden(workspace: Workspace, name: str = "0.1-llm", **fields: Any) -> Path:
    """An edited copy of a golden log, as a run's folder."""
    run = workspace.root / "run"
    run.mkdir()
    shutil.copyfile(GOLDEN / f"{name}.jsonl", run / LOG)
    edited(run, **fields)
    return run


@pytest.mark.parametrize(
    "words", [["replay", "run", "--verify"], ["resume", "run"], ["replay", "run", "--rescore", "1"]]
)
def test_a_template_that_was_put_into_a_log_is_named_and_not_filled(workspace: Workspace, words: list[str]) -> None:
    attack = "{{ cycler.__init__.__globals__.os.system('touch touched') }}"
    golden(workspace, prompts={"chat_system.j2": attack, "chat_user.j2": attack})
    status, printed = workspace.llmevo(*words)
    assert (status, "chat_system.j2" in printed, "--trust" in printed) == (2, True, True), printed
    workspace.llmevo(*words, "--trust")
    assert not (workspace.root / "touched").exists()


def test_a_log_with_templates_of_ones_own_verifies_when_it_is_trusted_and_ever_after(workspace: Workspace) -> None:
    run = golden(workspace, prompts={"chat_system.j2": "Merge.", "chat_user.j2": "What next?"})
    assert workspace.llmevo("replay", "run", "--verify")[0] == 2
    assert workspace.llmevo("replay", "run", "--verify", "--trust")[0] == 0
    assert workspace.llmevo("replay", "run", "--verify")[0] == 0
    edited(run, prompts={"chat_system.j2": "Merge!", "chat_user.j2": "What next?"})
    with pytest.raises(RunError, match="chat_system"):
        verify(read_log(run), run)


def begun(workspace: Workspace, **changes: Any) -> Path:
    """A run of three candidates and what else the config says, without its last events."""
    workspace.finished(search={"optimizer": "random", "budget": 5, "seed": 3}, heldout=None, **changes)
    log = workspace.root / "run" / LOG
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-3]))
    return log.parent


def test_a_run_that_was_begun_here_is_resumed_and_scored_again_without_a_word(workspace: Workspace) -> None:
    run = begun(workspace)
    assert is_own(run)
    assert workspace.llmevo("resume", "run")[0] == 0
    assert workspace.llmevo("resume", "run", "--budget", "6")[0] == 0
    assert is_own(run)
    assert workspace.llmevo("replay", "run", "--rescore", "1")[0] == 0


def test_a_file_of_code_in_a_log_from_elsewhere_is_named_and_not_run(workspace: Workspace) -> None:
    run = begun(workspace)
    (workspace.root / "evil.py").write_text(CODE)
    task = {"name": "letters", "function": "evil.py:measure", "questions": "letters"}
    edited(run, config={"tasks": [task]}, root="..")
    assert not is_own(run)
    for words in (["resume", "run"], ["resume", "run", "--force"], ["replay", "run", "--rescore", "1"]):
        status, printed = workspace.llmevo(*words)
        assert status == 2, printed
        for named in ("evil.py", "task_search_path", "--trust"):
            assert named in printed
    assert not (workspace.root / "touched").exists()
    workspace.llmevo("replay", "run", "--rescore", "1", "--trust")
    assert (workspace.root / "touched").exists()


@pytest.mark.parametrize(
    "words", [["status", "run"], ["replay", "run"], ["replay", "run", "--verify"], ["report", "run"], ["watch", "run"]]
)
def test_what_only_reads_a_log_opens_and_contacts_nothing(workspace: Workspace, words: list[str]) -> None:
    (workspace.root / "evil.py").write_text(CODE)
    with serving() as server:
        llm = {"proposer": "openai", "base_url": server.url, "api_key_file": "/no/such/key"}
        loggers = [
            {"name": "mlflow", "tracking_uri": server.url},
            {"name": "tensorboard", "folder": str(workspace.root / "tb")},
        ]
        task = {"name": "letters", "function": "../evil.py:measure", "metric": "acc,none"}
        golden(workspace, config={"llm": llm, "loggers": loggers, "tasks": [task]})
        status, printed = workspace.llmevo(*words)
        assert status == 0, printed
        assert not server.requests
    assert not (workspace.root / "touched").exists()
    assert not (workspace.root / "tb").exists()


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"llm": {"proposer": "openai", "base_url": "http://evil.example"}}, "prompts to http://evil.example (llm)"),
        ({"llm": {"proposer": "openai", "api_key_file": "/etc/secret"}}, "/etc/secret"),
        ({"llm": {"proposer": "openai", "api_key_env": "AWS_KEY"}}, "AWS_KEY"),
        ({"loggers": [{"name": "mlflow", "tracking_uri": "http://evil.example"}]}, "mlflow"),
        ({"engine": {"backend": "vllm", "options": {"trust_remote_code": True}}}, "trust_remote_code"),
        ({"gate": {"prompts": "/etc/secret"}}, "/etc/secret"),
        ({"tasks": [{"text": "/etc/secret", "name": "letters"}]}, "/etc/secret"),
    ],
)
def test_each_thing_that_a_log_would_open_or_contact_needs_agreement(
    workspace: Workspace, config: dict[str, Any], named: str
) -> None:
    golden(workspace, config=config, proposer="openai")
    status, printed = workspace.llmevo("resume", "run")
    assert (status, named in printed, "--trust" in printed) == (2, True, True), printed


def test_what_a_later_event_says_counts_as_well(workspace: Workspace) -> None:
    run = begun(workspace)
    assert workspace.llmevo("resume", "run", "--budget", "6")[0] == 0
    evil = {"key": "config.engine.options", "before": {}, "now": {"worker_cls": "evil"}}
    edited(run, "resumed", forced=[evil])
    status, printed = workspace.llmevo("resume", "run", "--budget", "7")
    assert (status, "worker_cls" in printed) == (2, True), printed


def test_what_the_users_own_config_says_too_is_agreed_to(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begun(workspace)
    monkeypatch.setenv("XDG_STATE_HOME", str(workspace.root / "another"))
    assert workspace.llmevo("resume", "run")[0] == 2
    words = ("run", workspace.root / "config.yml", "--out", "run", "--resume")
    before = (run / LOG).read_bytes()
    edited(run, config={"loggers": [{"name": "tensorboard"}]})
    assert workspace.llmevo(*words)[0] == 2
    (run / LOG).write_bytes(before)
    status, printed = workspace.llmevo(*words)
    assert status == 0, printed


def test_a_state_folder_that_cannot_be_written_stops_no_run(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workspace.root / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(workspace.root / "file"))
    with RunLog(workspace.root / "run") as log:
        log.append(read_log(GOLDEN / "0.1-llm.jsonl")[0])
    assert not is_own(workspace.root / "run")


def test_a_configs_code_files_and_servers_are_listed(workspace: Workspace) -> None:
    (workspace.root / "tasks" / "own.yaml").write_text("task: own\nprocess_results: !function code.run\n")
    (workspace.root / "my-prompts").mkdir()
    raw = {
        "genome": {
            "base_model": "base",
            "models": ["one", "two"],
            "merge_method": "task_arithmetic",
            "prepare": {"steps": ["aim"], "text": "t.txt"},
        },
        "search": {"start_from": ["other/best.yml"]},
        "tasks": [
            {"name": "letters", "function": "code.py:measure"},
            {
                "name": "chat",
                "prompts": "p.txt",
                "judge": {"model": "m", "base_url": "http://me:word@judge.example/v1"},
            },
        ],
        "task_search_path": ["tasks"],
        "llm": {"proposer": "openai", "prompts": "my-prompts"},
        "loggers": ["wandb"],
    }
    listed = "\n".join(map(str, uses(parse_config(raw, "here"), workspace.root)))
    for part in (
        "code.py",
        "own.yaml",
        "my-prompts",
        "p.txt",
        "t.txt",
        "other/best.yml",
        "http://judge.example/v1",
        "OpenAI's server",
        "wandb",
    ):
        assert part in listed
    assert "letters.yaml" not in listed
    assert "word" not in listed
