"""Every mistake a user can make: one clear message, exit status 2, nothing half-written."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from llmevo.cli.app import app
from llmevo.config import FOREIGN_OPTIONS
from llmevo.errors import CandidateError, ProposerRefused, SourceError
from llmevo.run.experiment import Experiment
from llmevo.run.log.storage import LOG
from llmevo.run.scorer import Scorer
from support.fake_server import refusal, serving
from support.made_logs import whole_run, written
from support.workspace import Workspace, write_task

GENOME: dict[str, Any] = {"base_model": "base", "models": ["one", "two"], "merge_method": "task_arithmetic"}
FEW: dict[str, Any] = {"optimizer": "random", "budget": 4}


def fails(workspace: Workspace, config: object, *says: str, options: tuple[object, ...] = ()) -> str:
    """Run it: exit status 2, a message with these words, no traceback, no run folder."""
    status, printed = workspace.llmevo("run", config, "--out", "run", *options)
    assert status == 2, printed
    for words in says:
        assert words in printed
    assert "Traceback" not in printed
    assert not (workspace.root / "run").exists()
    return printed


def test_a_config_that_is_not_there(workspace: Workspace) -> None:
    fails(workspace, "nowhere.yml", "nowhere.yml", "no such file")


def test_a_zero_on_the_command_line_is_a_value(workspace: Workspace) -> None:
    config = workspace.config(search={**FEW, "seed": 3})
    assert workspace.llmevo("run", config, "--seed", 0, "--out", "zero")[0] == 0
    begun = workspace.state("zero").started
    assert begun
    assert begun.seed == 0
    fails(workspace, config, "llm.max_cost", "greater than 0", options=("--max-cost", 0))
    status, printed = workspace.llmevo(
        *("run", config, "--dry-run", "--optimizer", "llm", "--model", "x", "--base-url", "http://localhost:1/v1"),
        *("--max-llm-calls", 0, "--set", "llm.proposer=openai"),
    )
    assert status == 0, printed
    assert "The LLM is asked" not in printed


def test_a_terminal_of_another_encoding_loses_letters_and_no_run(workspace: Workspace) -> None:
    config = workspace.config(search=FEW)
    for words in (("run", config, "--out", "run"), ("status", "run"), ("replay", "run")):
        done = subprocess.run(
            [Path(sys.executable).with_name("llmevo"), *map(str, words)],
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
            capture_output=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, b""), words
        assert done.stdout.isascii()


@pytest.mark.parametrize("place", ["one", "config.yml", "config.yml/x"])
def test_a_run_is_written_into_no_model_and_no_file(workspace: Workspace, place: str) -> None:
    config = workspace.config(search=FEW)
    before = sorted(Path("one").iterdir())
    status, printed = workspace.llmevo("run", config, "--out", place)
    assert status == 2, printed
    assert "choose another --out" in printed
    assert sorted(Path("one").iterdir()) == before


def test_a_place_for_runs_that_is_a_file_is_named_before_anything_is_checked(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(_: Experiment) -> None:
        raise AssertionError("checked first")

    monkeypatch.setattr(Experiment, "check", check)
    Path("runs").write_text("")
    status, printed = workspace.llmevo("run", workspace.config(search=FEW))
    assert (status, "runs/config is no place for a run: runs is a file" in printed) == (2, True), printed


def test_a_run_that_begins_while_another_is_checked_has_a_folder_of_its_own(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, check = workspace.config(search=FEW), Experiment.check

    def checked(self: Experiment) -> None:
        check(self)
        written(Path("runs/config"), whole_run())

    monkeypatch.setattr(Experiment, "check", checked)
    status, printed = workspace.llmevo("run", config)
    assert status == 0, printed
    assert workspace.state("runs/config-2").finished
    assert len(workspace.events("runs/config")) == len(whole_run())


def test_the_log_of_a_run_is_no_folder(workspace: Workspace) -> None:
    workspace.finished(search=FEW)
    status, printed = workspace.llmevo("resume", f"run/{LOG}")
    assert (status, f"run/{LOG} is the log of a run; give its folder, run" in printed) == (2, True)


def test_finished_runs_are_compared_without_the_options_of_a_config(workspace: Workspace) -> None:
    workspace.finished(search=FEW)
    for words in (("--seeds", 5), ("--budget", 5), ("--set", "limit=3"), ("--workers", 2), ("--trust",)):
        status, printed = workspace.llmevo("compare", "run", *words)
        assert status == 2, printed
        assert f"{' '.join(map(str, words))}: finished runs are compared as they are" in printed
    assert workspace.llmevo("compare", "run")[0] == 0


def test_a_config_that_is_not_yaml(workspace: Workspace) -> None:
    Path("bad.yml").write_text("genome: [unclosed")
    fails(workspace, "bad.yml", "it is not YAML")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"serach": {}}, ("serach", "did you mean 'search'")),
        ({"search": {"bugdet": 5}}, ("search.bugdet", "did you mean 'budget'")),
        ({"search": {"budget": "many"}}, ("search.budget", "'many'")),
        ({"search": {"budget": 2}}, ("search.budget", "4 evaluations")),
        ({"search": {"optimizer": "cma"}}, ("optimizer 'cma' is unknown",)),
        ({"genome": {**GENOME, "merge_method": "tiess"}}, ("'tiess'", "did you mean 'ties'")),
        ({"genome": {**GENOME, "base_model": None}}, ("base_model is missing",)),
        ({"genome": {**GENOME, "layer_granularity": 3}}, ("layer_granularity", "use one of 1, 2")),
        ({"genome": {**GENOME, "models": ["one", "nowhere"]}}, ("nowhere", "no such folder")),
        ({"genome": {**GENOME, "models": ["one", "owner/model"]}}, ("owner/model", "hub")),
        ({"tasks": []}, ("tasks",)),
        ({"tasks": ["leters"]}, ("'leters'", "did you mean 'letters'")),
        ({"heldout": ["leters_heldout"]}, ("heldout: ", "'leters_heldout'", "did you mean 'letters_heldout'")),
        ({"tasks": ["no_task_of_this_kind_anywhere_1"]}, ("`llmevo tasks` lists them",)),
        ({"tasks": [{"name": "letters", "weight": 0}]}, ("tasks: every weight is 0",)),
        ({"heldout": [{"name": "letters_heldout", "weight": 0}]}, ("heldout: every weight is 0",)),
        ({"tasks": [{"name": "letters", "weight": 1e154}]}, ("tasks", "weight", "1000000")),
        ({"tasks": [{"name": "letters", "metric": "f1,none"}]}, ("'f1,none'", "'acc,none'")),
        ({"task_search_path": ["nowhere"]}, ("nowhere",)),
        ({"llm": {"proposer": "openai"}}, ("OPENAI_API_KEY", "--base-url")),
        ({"llm": {"proposer": "local", "model": "nowhere/at/all"}}, ("nowhere/at/all",)),
        ({"llm": {"proposer": "local", "prompts": "nowhere"}}, ("llm.prompts",)),
        ({"llm": {"api_key_file": "nowhere"}}, ("llm.api_key_file",)),
        ({"llm": {"max_cost": 2}}, ("max_cost", "price: {prompt:")),
        ({"search": {"sigma_rule": "cma"}}, ("search.sigma_rule", "'cma'")),
        ({"search": {"start_from": ["nowhere.yml"]}}, ("search.start_from", "nowhere.yml")),
        ({"engine": {"device": "tpu"}}, ("engine.device: 'tpu' cannot be used; give cpu",)),
        (
            {"engine": {"backend": "hf", "options": {"max_model_len": 9}}},
            ("engine.options: max_model_len: they are vLLM's", "set `backend: vllm`"),
        ),
        (
            {"genome": {**GENOME, "prepare": {"steps": ["regmean"], "tasks": {"one": ["leters"]}}}},
            ("prepare.tasks: `tasks:` has no task 'leters', did you mean 'letters'",),
        ),
        (
            {"genome": {**GENOME, "prepare": {"steps": ["regmean"], "text": "nowhere.json"}}},
            ("prepare.text: ", "nowhere.json cannot be read"),
        ),
        ({"search": {"seed": -1}}, ("search.seed", "-1")),
        ({"search": {"evaluation_seed": -1}}, ("search.evaluation_seed", "-1")),
        ({"search": {"seed": 2**32}}, ("search.seed: 4294967296", "largest seed")),
        (
            {"genome": {**GENOME, "filters": ["self_atn"]}},
            ("genome.filters: ", "'self_atn'", "did you mean 'self_attn'"),
        ),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_a_wrong_value_is_named_with_the_way_out(
    workspace: Workspace, changes: dict[str, Any], says: tuple[str, ...]
) -> None:
    given = workspace.config(**changes)
    assert "Loading models" not in fails(workspace, given, *says)
    status, inspected = workspace.llmevo("inspect", given)
    assert (status, [words for words in says if words not in inspected]) == (2, [])


def test_vllm_that_is_not_installed_is_found_before_anything_is_loaded(workspace: Workspace) -> None:
    workspace.monkeypatch.setitem(sys.modules, "vllm", None)
    given = workspace.config(engine={"backend": "vllm"})
    assert "Loading models" not in fails(workspace, given, "engine.backend: vLLM cannot be imported")
    status, inspected = workspace.llmevo("inspect", given)
    assert (status, "engine.backend: vLLM cannot be imported" in inspected) == (2, True)


def test_a_misspelt_task_is_found_before_anything_is_loaded(workspace: Workspace) -> None:
    workspace.monkeypatch.setattr("llmevo.cli.run.Experiment", None)
    fails(workspace, workspace.config(tasks=["leters"]), "tasks: there is no task 'leters', did you mean 'letters'")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--seed", "-1"), ("search.seed", "(it is -1)")),
        (("--api-key", ""), ("--api-key: the key is empty",)),
        (("--max-llm-calls", "-1"), ("llm.max_calls", "(it is -1)")),
        (("--max-fevals", "100"), ("--max-fevals: there is no such option here; use --budget",)),
        (("--max-fevals=100",), ("--max-fevals: there is no such option here; use --budget",)),
        (("--sigma0", "0.2"), ("--sigma0", "leave it out", "step size")),
        (("--strategy", "pool"), ("--strategy", "leave it out")),
        (("--vllm",), ("--vllm", "use --backend vllm")),
        (("--storage-path", "x"), ("--storage-path", "use the option --out")),
        (("--merge-cuda",), ("--merge-cuda", "engine.device")),
        (("--llm-model", "gpt-4o"), ("--llm-model", "use --model")),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_an_option_that_is_not_is_told_with_the_way_out(
    workspace: Workspace, words: tuple[str, ...], says: tuple[str, ...]
) -> None:
    fails(workspace, workspace.config(), *says, options=words)


@pytest.mark.parametrize("words", [("--what-if", "optimizer=cma-es"), ("--what-if=seed=3",)])
def test_an_option_that_was_removed_is_refused_with_what_to_do_instead(
    workspace: Workspace, words: tuple[str, ...]
) -> None:
    status, printed = workspace.llmevo("replay", "run", *words)
    assert status == 2
    assert printed.startswith("Error: --what-if: this option was removed; `llmevo compare CONFIG --optimizers A,B")
    assert len(printed.splitlines()) == 1


def test_no_option_of_another_tool_is_one_of_ours() -> None:
    ours = {name for command in typer.main.get_group(app).commands.values() for p in command.params for name in p.opts}
    assert not ours & {f"--{name}" for name in FOREIGN_OPTIONS}


def test_a_torn_weight_file(workspace: Workspace) -> None:
    file = Path("two/model.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    fails(workspace, workspace.config(), "two", "torn")


def test_a_prompt_template_with_a_missing_variable(workspace: Workspace) -> None:
    Path("prompts").mkdir()
    Path("prompts/completion.j2").write_text("{{ nonsense }}")
    config = workspace.config(llm={"proposer": "local", "prompts": "prompts"})
    status, printed = workspace.llmevo("run", config, "--out", "run")
    assert status == 2
    assert "completion.j2" in printed
    assert "nonsense" in printed


def test_an_output_folder_that_holds_another_run_is_left_as_it_is(workspace: Workspace) -> None:
    Path("run").mkdir()
    Path("run/events.jsonl").write_text("precious\n")
    status, printed = workspace.llmevo("run", workspace.config(), "--out", "run")
    assert status == 2
    assert "llmevo resume run" in printed
    assert Path("run/events.jsonl").read_text() == "precious\n"
    assert [file.name for file in Path("run").iterdir()] == ["events.jsonl"]


def test_a_bad_key_is_found_out_before_the_run_and_not_shown(workspace: Workspace) -> None:
    with serving(refusal(401, "Incorrect API key provided: sk-bad")) as server:
        config = workspace.config(llm={"proposer": "openai", "base_url": server.url})
        printed = fails(workspace, config, "refuses", "API key", options=("--api-key", "sk-bad"))
        assert len(server.requests) == 1
    assert "sk-bad" not in printed


def test_an_unreachable_server(workspace: Workspace) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = workspace.config(llm={"proposer": "openai", "base_url": f"http://127.0.0.1:{port}/v1"})
    fails(workspace, config, "no server answers", "--base-url")


@pytest.mark.parametrize("command", ["resume", "replay"])
def test_a_folder_without_a_run(workspace: Workspace, command: str) -> None:
    Path("empty").mkdir()
    status, printed = workspace.llmevo(command, "empty")
    assert status == 2
    assert "holds no run" in printed


def test_a_recipe_that_mergekit_would_reject_says_why(workspace: Workspace) -> None:
    Path("recipe.yml").write_text("merge_method: linear\nmodels: [{model: one}]\nnormalise: true\n")
    status, printed = workspace.llmevo("merge", "recipe.yml", "out")
    assert status == 2
    assert "normalise" in printed
    assert not Path("out").exists()


def test_a_dry_run_shows_space_prompt_and_forecast_and_writes_nothing(workspace: Workspace) -> None:
    before = sorted(workspace.root.rglob("*"))
    status, printed = workspace.llmevo("run", workspace.config(), "--dry-run", "--budget", 20)
    assert status == 0, printed
    for words in ("4 genes over 2 layers", "one/0-0/weight", "First prompt", "score 99 |", "20 evaluations of"):
        assert words in printed
    assert sorted(set(workspace.root.rglob("*")) - {workspace.root / "config.yml"}) == [
        path for path in before if path != workspace.root / "config.yml"
    ]


def test_inspect_shows_the_same(workspace: Workspace) -> None:
    status, printed = workspace.llmevo("inspect", workspace.config(search={"optimizer": "random", "budget": 5}))
    assert status == 0, printed
    assert "4 genes" in printed
    assert "First prompt" not in printed


def test_runs_without_out_get_folders_of_their_own(workspace: Workspace) -> None:
    config = workspace.config(search=FEW, heldout=None)
    for _ in range(2):
        assert workspace.llmevo("run", config)[0] == 0
    assert {path.name for path in Path("runs").iterdir()} == {"config", "config-2"}


@pytest.mark.parametrize("existed", [False, True])
def test_a_mistake_that_shows_before_anything_is_scored_leaves_no_new_folder(
    workspace: Workspace, existed: bool
) -> None:
    def refuse(*_: object) -> None:
        raise SourceError("models: they cannot be loaded")

    workspace.monkeypatch.setattr(Scorer, "_start_engine", refuse)
    if existed:
        Path("runs/config").mkdir(parents=True)
    status, printed = workspace.llmevo("run", workspace.config(), "--out", "runs/config")
    assert (status, "they cannot be loaded" in printed) == (2, True)
    assert Path("runs/config").exists() is existed


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), ProposerRefused("the key is refused")])
def test_a_run_that_was_stopped_before_anything_was_scored_can_be_resumed(
    workspace: Workspace, stop: BaseException
) -> None:
    def stopped(*_: object) -> None:
        raise stop

    with workspace.monkeypatch.context() as patched:
        patched.setattr(Scorer, "_start_engine", stopped)
        assert workspace.llmevo("run", workspace.config(search=FEW), "--out", "run")[0] in (2, 130)
    status, printed = workspace.llmevo("resume", "run")
    assert status == 0, printed


def test_a_run_whose_candidates_all_failed_keeps_its_log(workspace: Workspace) -> None:
    def failed(*_: object) -> None:
        raise CandidateError("it cannot be merged")

    workspace.monkeypatch.setattr(Scorer, "score", failed)
    status, printed = workspace.llmevo("run", workspace.config(search=FEW), "--out", "run")
    assert (status, "all 4 start rows failed" in printed) == (2, True)
    assert len(workspace.state("run").trials) == 4


def test_options_win_over_the_config_and_are_kept_in_the_log(workspace: Workspace) -> None:
    config = workspace.config(heldout=None)
    write_task(workspace.root, "more", 2)
    workspace.llmevo("run", config, "--out", "run", "--optimizer", "random", "--budget", "5", "--seed", "8")
    started = workspace.state("run").started
    assert started is not None
    assert started.seed == 8
    assert started.config["search"]["budget"] == 5
    given = {"optimizer": "random", "budget": 5, "seed": 8}
    values = yaml.safe_load(config.read_text())
    written = yaml.safe_load((workspace.root / "run" / "config.yml").read_text())
    assert written == {**values, "search": {**values["search"], **given}}
    workspace.llmevo("run", config, "--out", "as-given")
    assert (workspace.root / "as-given" / "config.yml").read_text() == config.read_text()


def test_the_options_of_the_llm_are_kept_in_the_log(workspace: Workspace) -> None:
    config = workspace.config(llm={"proposer": "local", "price": {"prompt": 1.0}}, heldout=None)
    options = ("--mask-names", "--max-llm-calls", 3, "--max-cost", 0.5, "--strict-llm", "--budget", 4)
    status, printed = workspace.llmevo("run", config, "--out", "run", *options)
    assert status == 0, printed
    started = workspace.state("run").started
    assert started is not None
    llm = started.config["llm"]
    assert (llm["mask_names"], llm["max_calls"], llm["max_cost"], llm["strict"]) == (True, 3, 0.5, True)


def test_the_process_title_hides_the_key() -> None:
    from llmevo.cli.terminal import without_key

    assert without_key(["run", "c.yml", "--api-key", "sk-1", "--budget", "3"]) == [
        *("run", "c.yml", "--api-key", "***", "--budget", "3")
    ]
    assert without_key(["--api-key=sk-1"]) == ["--api-key=***"]


@pytest.mark.parametrize("command", typer.main.get_group(app).commands)
def test_every_command_explains_itself_with_an_example(workspace: Workspace, command: str) -> None:
    status, printed = workspace.llmevo(command, "--help")
    assert status == 0
    assert f"Example: llmevo {command}" in " ".join(printed.split())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("run", "config.yml", f"--{'long-' * 20}option", "1"), f"No such option: --{'long-' * 20}option"),
        (("run",), "Missing argument 'CONFIG'"),
        (("report", "a", "--out"), "Option '--out' requires an argument"),
        (
            ("compare", "c.yml", "--seeds", "x"),
            "'--seeds': Input should be a valid integer, unable to parse string as an integer",
        ),
        (("resum",), "No such command 'resum'"),
        ((f"--{'long-' * 20}option",), f"No such option: --{'long-' * 20}option"),
    ],
    ids=lambda value: "" if isinstance(value, tuple) else value[:20],
)
def test_a_mistake_in_the_options_is_one_line_in_a_pipe(words: tuple[str, ...], says: str) -> None:
    command = [Path(sys.executable).with_name("llmevo"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert any(says in line for line in done.stderr.splitlines()), done.stderr


def test_the_installed_command_starts() -> None:
    program = Path(sys.executable).with_name("llmevo")
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    assert "task_arithmetic" in done.stdout
