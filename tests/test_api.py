"""The Python API: its names, and the example in the docstring of each, on tiny models."""

import doctest
import json
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import llmevo
from llmevo.errors import ConfigError, LogError, RunError, SourceError
from llmevo.llm.client import Connection
from llmevo.run.log import events
from llmevo.search.simulated_llm import SimulatedClient
from support.checkpoints import assert_same_bits, weights_of
from support.workspace import Workspace

NAMES = ["Config", "LlmevoError", "Recipe", "Run", "Search", "__version__", "evolve", "extract", "merge", "open_run"]
GENOME = {"base_model": "base", "models": ["one", "two"], "merge_method": "task_arithmetic"}


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "genome": {**GENOME, "dtype": "float32"},
        "tasks": [{"name": "letters", "weight": 1.0}],
        "heldout": ["letters_heldout"],
        "task_search_path": ["tasks"],
        "search": {"optimizer": "random", "budget": 9},
        **changes,
    }


def test_the_names_of_the_package_are_these() -> None:
    assert llmevo.__all__ == NAMES
    assert {*NAMES} <= {*dir(llmevo)}
    with pytest.raises(AttributeError, match="'run_it'"):
        _ = llmevo.run_it  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType, reportUnknownMemberType]


def test_the_version_is_the_one_of_the_distribution() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert llmevo.__version__ == project["version"]


def test_importing_the_package_loads_no_library() -> None:
    code = (
        "import sys; before = {*sys.modules}; import llmevo; dir(llmevo);"
        " loaded = {name.partition('.')[0] for name in {*sys.modules} - before} - sys.stdlib_module_names;"
        " assert loaded == {'llmevo'}, loaded; llmevo.open_run, llmevo.Config, llmevo.Recipe;"
        " assert not {'torch', 'lm_eval', 'transformers', 'huggingface_hub'} & {*sys.modules}"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture
def example(workspace: Workspace) -> Workspace:
    """A folder with a finished run `runs/example`."""
    workspace.finished(out="runs/example", search={"optimizer": "random", "budget": 9}, llm=None)
    return workspace


@pytest.mark.usefixtures("example")
@pytest.mark.parametrize("name", [name for name in NAMES if name != "__version__"])
def test_every_name_has_an_example_that_does_what_it_says(name: str) -> None:
    tests = doctest.DocTestFinder(recurse=False).find(getattr(llmevo, name), name)
    assert [test for test in tests if test.examples]
    for test in tests:
        assert doctest.DocTestRunner().run(test).failed == 0


def test_a_run_from_python_is_a_run(workspace: Workspace) -> None:
    run = llmevo.evolve(settings(), "runs/example")
    assert workspace.llmevo("replay", "runs/example", "--verify")[0] == 0
    assert run.best is not None
    assert run.best.score == run.state.best.value if run.state.best else False
    assert run.heldout["best"].tasks.keys() == {"letters_heldout"}
    assert [row.id for row in run.trials] == [*range(9)]
    json.dumps([asdict(row) | {"recipe": row.recipe.as_dict()} for row in run.trials])
    assert workspace.llmevo("export", "runs/example", "by-command")[0] == 0
    assert_same_bits(weights_of(run.export("by-api")), weights_of(Path("by-command")))
    assert (run.export("pack", recipe_only=True) / "best.yml").exists()


def test_what_stops_a_run_is_raised_and_the_run_continues(workspace: Workspace) -> None:
    seen: list[str] = []

    def stop(event: events.Event, _: object) -> None:
        seen.append(event.event)
        if len(seen) == 4:
            raise KeyboardInterrupt

    config = workspace.config(search={"optimizer": "random", "budget": 9}, llm=None)
    with pytest.raises(KeyboardInterrupt):
        llmevo.evolve(config, "runs/stopped", observe=stop)
    assert not llmevo.open_run("runs/stopped").is_finished
    with pytest.raises(RunError, match="holds a run already"):
        llmevo.evolve(config, "runs/stopped")
    run = llmevo.evolve(config, "runs/stopped", resume=True)
    assert run.is_finished
    assert seen[:2] == ["run_started", "asked"]
    assert (run.folder / "config.yml").read_text() == config.read_text()


def test_a_mistake_in_a_config_is_raised_before_anything_is_written(workspace: Workspace) -> None:
    for changes, error in (
        ({"search": {"optimizer": "random", "budget": 2}}, ConfigError),
        ({"search": {"optimiser": "random"}}, ConfigError),
        ({"genome": {**GENOME, "models": ["one", "away"]}}, SourceError),
        ({"tasks": [{"name": "taste", "prompts": "prompts.txt", "votes": {"pairs": 3}}]}, ConfigError),
    ):
        (workspace.root / "prompts.txt").write_text("Say a.\n")
        with pytest.raises(error):
            llmevo.evolve(settings(**changes), "runs/wrong")
        assert not Path("runs/wrong").exists()


def test_an_export_with_another_model_is_refused_unless_forced(example: Workspace) -> None:
    run = llmevo.open_run("runs/example")
    (example.root / "one" / "model.safetensors").write_bytes((example.root / "two" / "model.safetensors").read_bytes())
    with pytest.raises(RunError, match="a model has changed"):
        run.export("out")
    assert run.export("out", force=True).exists()


def height(genes: dict[str, float]) -> float:
    return 1.0 - sum((value - 0.4) ** 2 for value in genes.values()) / 10


@pytest.mark.parametrize("optimizer", ["llm", "llm-off", "cma-es", "tpe", "llm-evo-merge"])
def test_a_search_with_an_evaluator_of_ones_own_gets_better(optimizer: str) -> None:
    client = SimulatedClient(Connection("recombiner")) if optimizer.startswith("llm") else None
    search = llmevo.Search(GENOME, layers=4, optimizer=optimizer, budget=40, client=client)
    while candidates := search.ask(5):
        for candidate in candidates:
            search.tell(candidate, height(candidate.genes))
    assert len(search.trials) == 40
    assert [trial.candidate.origin for trial in search.trials[:4]] == ["uniform", "coefficient", "parent", "parent"]
    assert search.best is not None
    assert search.best.value >= max(trial.value for trial in search.trials[:4])


def test_a_search_reads_the_depth_of_its_models_and_makes_their_recipes(workspace: Workspace) -> None:
    search = llmevo.Search({**GENOME, "layer_granularity": 1}, optimizer="random", root=workspace.root)
    assert len(search.space.genes) == 2 * 2
    (candidate,) = search.ask(1)
    llmevo.merge(search.recipe(candidate), "out", root=workspace.root)
    assert weights_of(Path("out")).keys() == weights_of(Path("one")).keys()


def test_a_search_says_what_it_cannot_do() -> None:
    search = llmevo.Search(GENOME, layers=4, budget=20)
    first, *rest = search.ask(20)
    with pytest.raises(RunError, match="have no score yet"):
        search.ask(1)
    for candidate in (first, *rest):
        search.tell(candidate, None if candidate is first else 0.5, 0.1)
    with pytest.raises(RunError, match="not waiting"):
        search.tell(first, 1.0)
    assert search.trials[0].score is None
    assert search.best is not None
    with pytest.raises(ConfigError, match="give the search a `client`"):
        llmevo.Search(GENOME, layers=4, optimizer="llm")
    with pytest.raises(ConfigError, match="did you mean 'cma-es'"):
        llmevo.Search(GENOME, layers=4, optimizer="cma_es")


def test_errors_of_the_package_have_one_root() -> None:
    assert all(issubclass(error, llmevo.LlmevoError) for error in (ConfigError, LogError, RunError, SourceError))


def test_the_wheel_says_that_it_is_typed_and_holds_the_prompts_and_the_schema_of_configs(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, root]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {*archive.namelist()}
    prompts = {f"llmevo/prompts/{file.name}" for file in (root / "prompts").iterdir()}
    assert {"llmevo/__init__.py", "llmevo/py.typed", "llmevo/schemas/config.json", *prompts} <= names
