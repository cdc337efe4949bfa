"""Runs whose models are prepared: their genes, log, recipe and exports."""

from pathlib import Path
from typing import Any

import pytest

from llmevo.merging.merger import Merger
from llmevo.merging.recipe import Recipe
from llmevo.models.sources import Sources
from llmevo.reports.html.analysis import Subject, costs
from llmevo.run.scorer import Scorer
from support.checkpoints import assert_same_bits, weights_of
from support.ray_cluster import MARKS
from support.workspace import Workspace

GENOME: dict[str, Any] = {"base_model": "base", "models": ["one", "two"], "dtype": "float32", "layer_granularity": 1}


def genome(prepare: Any, **changes: Any) -> dict[str, Any]:
    return {**GENOME, "merge_method": "task_arithmetic", "prepare": prepare, **changes}


@pytest.mark.parametrize(
    "prepare", [["wudi"], ["aim", {"star": {"eta": 0.6}}], ["svd_llm", "regmean"], ["regmean_plusplus"]], ids=str
)
def test_a_search_over_prepared_models_verifies_and_exports_what_it_scored(
    workspace: Workspace, prepare: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMEVO_HOME", str(workspace.root / "cache"))
    search = {"optimizer": "cma-es", "budget": 8, "population": 2, "seed": 3}
    config = workspace.config(genome=genome(prepare), search=search)
    status, printed = workspace.llmevo("run", config, "--out", "run")
    assert status == 0, printed
    assert "Prepared 2 models in" in printed
    assert ("forward passes over" in printed) is (prepare != ["wudi"])
    kept = [*(workspace.root / "cache").glob("activations/*")]
    assert len(kept) == ("aim" in prepare)  # products of inputs are large, and go once the experts are prepared
    state = workspace.state("run")
    assert state.started
    assert [gene["name"] for gene in state.started.genes if gene["name"].endswith("prepare")] == [
        "0-0/prepare",
        "1-1/prepare",
    ]
    parents = [trial for trial in state.trials.values() if trial.candidate.origin == "parent"]
    assert all(value == 0.0 for trial in parents for name, value in trial.candidate.genes.items() if "prepare" in name)
    assert ["prepare" in trial.seconds for trial in state.trials.values() if trial.seconds].count(True) == 1
    phases = {phase.name: phase.seconds for phase in costs(Subject.of(workspace.root / "run")).phases}
    assert phases["preparing models"] == sum(trial.seconds.get("prepare", 0.0) for trial in state.trials.values()) > 0
    assert workspace.llmevo("replay", "run", "--verify")[0] == 0

    best = max(number for number in state.trials)
    recipe = Recipe.model_validate(state.recipes[best])
    assert recipe.prepare
    assert recipe.prepare.names == [name if isinstance(name, str) else next(iter(name)) for name in prepare]
    status, printed = workspace.llmevo("export", "run", "pack", "--candidate", best, "--recipe-only")
    assert status == 0, printed
    assert ("questions.json, which holds the texts of its preparation" in printed) is (prepare != ["wudi"])
    assert workspace.llmevo("export", "run", "out", "--candidate", best)[0] == 0
    written = weights_of(workspace.root / "out")
    text = (workspace.root / "out" / "best.yml").read_text()
    assert "mergekit cannot: it has no prepare" in text
    card = (workspace.root / "out" / "README.md").read_text()
    assert ("bit for bit" in card) is (prepare == ["wudi"])
    assert ("with questions.json, which is not published, up to rounding" in card) is (prepare != ["wudi"])
    again = dict(Merger(Sources(workspace.root)).merge(_with_texts(recipe, workspace.root / "run")))
    assert_same_bits(written, again)

    assert workspace.llmevo("export", "run", "experts", "--candidate", best, "--as", "experts")[0] == 0
    plain = Recipe.from_yaml((workspace.root / "experts" / "recipe.yml").read_text())
    assert plain.prepare is None  # and no parameter of that name, which would be refused
    assert plain.mergekit_clause == "mergekit reads it too"
    status, printed = workspace.llmevo("merge", "experts/recipe.yml", "merged")
    assert status == 0, printed
    for name, tensor in weights_of(workspace.root / "merged").items():
        assert float((tensor - written[name]).abs().max()) < 1e-5


def _with_texts(recipe: Recipe, run: Path) -> Recipe:
    from llmevo.merging.preparation.texts import read_texts

    assert recipe.prepare
    return recipe.with_text(read_texts(recipe.prepare.text, run).keep()) if recipe.prepare.text else recipe


def test_llmevo_merge_reads_the_texts_beside_a_runs_best_recipe(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMEVO_HOME", str(workspace.root / "cache"))
    config = workspace.config(genome=genome(["aim"], bounds={"prepare": [0.5, 1.0]}))  # an LLM leads this search
    status, printed = workspace.llmevo("inspect", config)
    assert status == 0, printed
    assert not (workspace.root / "cache" / "prepared").exists()
    status, printed = workspace.llmevo("run", config, "--out", "run")
    assert status == 0, printed
    assert (workspace.root / "run" / "questions.json").exists()
    monkeypatch.setenv("LLMEVO_HOME", str(workspace.root / "other"))  # another machine
    status, printed = workspace.llmevo("merge", "run/best.yml", "merged")
    assert status == 0, printed
    assert workspace.llmevo("export", "run", "out")[0] == 0
    assert_same_bits(weights_of(workspace.root / "merged"), weights_of(workspace.root / "out"))


def test_an_export_of_a_log_from_elsewhere_loads_its_tasks_only_with_consent(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMEVO_HOME", str(workspace.root / "cache"))
    search = {"optimizer": "cma-es", "budget": 6, "population": 2, "seed": 3}
    config = workspace.config(genome=genome(["aim"], bounds={"prepare": [0.5, 1.0]}), search=search)
    status, printed = workspace.llmevo("run", config, "--out", "run")
    assert status == 0, printed
    monkeypatch.setenv("XDG_STATE_HOME", str(workspace.root / "state"))
    monkeypatch.setenv("LLMEVO_HOME", str(workspace.root / "other"))  # another machine
    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "evaluator", property(lambda _: pytest.fail("the tasks are loaded")))
        status, printed = workspace.llmevo("export", "run", "out")
        assert status == 0, printed
        (workspace.root / "run" / "questions.json").rename(workspace.root / "kept.json")
        assert workspace.llmevo("export", "run", "pack", "--recipe-only")[0] == 0
        status, printed = workspace.llmevo("export", "run", "again")
        assert (status, "task_search_path" in printed, "--trust" in printed) == (2, True, True), printed
        assert not (workspace.root / "again").exists()
    status, printed = workspace.llmevo("export", "run", "again", "--trust")
    assert status == 0, printed
    assert_same_bits(weights_of(workspace.root / "out"), weights_of(workspace.root / "again"))


def test_a_run_whose_texts_have_changed_is_not_resumed(workspace: Workspace) -> None:
    texts = workspace.root / "texts.txt"
    texts.write_text("a b c\nb c d\n")
    config = workspace.config(
        genome=genome({"steps": ["aim"], "text": "texts.txt"}),
        search={"optimizer": "cma-es", "budget": 4, "seed": 3},
    )
    status, printed = workspace.llmevo("run", config, "--out", "run")
    assert status == 0, printed
    assert workspace.llmevo("replay", "run", "--verify")[0] == 0
    texts.write_text("a b c\nb c e\n")
    status, printed = workspace.llmevo("resume", "run", "--budget", "6")
    assert status != 0
    assert "prepare.text" in printed


def test_a_method_that_needs_no_base_is_not_prepared(workspace: Workspace) -> None:
    both = ["task_arithmetic", "linear"]
    config = workspace.config(genome=genome(["wudi"], merge_method=both, method_per_slice=True))
    from llmevo.config import read_config
    from llmevo.search.space import SearchSpace

    space = SearchSpace(read_config(config).genome, 2)
    genes = space.uniform() | {"0-0/merge_method": 0.0, "1-1/merge_method": 1.0, "0-0/prepare": 0.3, "1-1/prepare": 0.4}
    recipe = space.decode(genes)
    slices = recipe.slices or []
    assert [recipe.prepared_share(of, "x", 0.0) for of in slices] == [0.3, 0.0]
    assert space.decode(space.uniform() | {"0-0/merge_method": 1.0, "1-1/merge_method": 1.0}).prepare is None


@pytest.mark.parametrize("on", [pytest.param("processes", marks=pytest.mark.slow), pytest.param("ray", marks=MARKS)])
def test_workers_merge_the_same_experts_which_are_prepared_once(
    workspace: Workspace, on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMEVO_HOME", str(workspace.root / "cache"))
    engine: dict[str, Any] = {"backend": "hf", "device": "cpu", "workers": 2, "on": on, "self_check": False}
    if on == "ray":
        engine["address"] = "none"
    search = {"optimizer": "random", "budget": 6, "seed": 3, "order": "strict"}
    given = {"genome": genome(["regmean"], bounds={"prepare": [0.5, 1.0]}), "search": search}
    status, printed = workspace.llmevo("run", workspace.config(**given, engine=engine), "--out", "run")
    assert status == 0, printed
    (made,) = (workspace.root / "cache" / "prepared").iterdir()
    written = (made / "model.safetensors").stat()
    alone = {"backend": "hf", "device": "cpu", "self_check": False}
    status, printed = workspace.llmevo("run", workspace.config(**given, engine=alone), "--out", "alone")
    assert status == 0, printed
    assert [*(workspace.root / "cache" / "prepared").iterdir()] == [made]
    assert (made / "model.safetensors").stat().st_mtime_ns == written.st_mtime_ns
    both = [workspace.state(name) for name in ("run", "alone")]
    first, second = ({id_: trial.score for id_, trial in state.trials.items()} for state in both)
    assert first == second
    assert len(first) >= 6
    assert ["prepare" in trial.seconds for trial in both[0].trials.values() if trial.seconds].count(True) == 1


def test_a_search_may_choose_the_method_that_merges_the_prepared_models(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMEVO_HOME", str(workspace.root / "cache"))
    methods = ["task_arithmetic", "tsv", "ties", "linear"]
    search = {"optimizer": "random", "budget": 14, "seed": 1}
    config = workspace.config(genome=genome(["wudi"], merge_method=methods), search=search)
    status, printed = workspace.llmevo("run", config, "--out", "run")
    assert status == 0, printed
    recipes = [Recipe.model_validate(of) for of in workspace.state("run").recipes.values()]
    assert {of.merge_method for of in recipes} == {*methods}
    for of in recipes:
        assert (of.prepare is None) == (of.merge_method == "linear")
    assert len([*(workspace.root / "cache" / "prepared").iterdir()]) == 1  # for all methods
    status, printed = workspace.llmevo("replay", "run", "--verify")
    assert status == 0, printed


def test_the_gate_is_calibrated_on_parents_whose_preparation_reads_the_search_questions(workspace: Workspace) -> None:
    config = workspace.config(
        genome=genome(["regmean"]), search={"optimizer": "cma-es", "budget": 7, "seed": 3}, gate={"tokens": 16}
    )
    status, printed = workspace.llmevo("run", config, "--out", "run")
    assert status == 0, printed
    assert "cannot be read" not in printed
    assert any(trial.score for trial in workspace.state("run").trials.values())
