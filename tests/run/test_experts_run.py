"""Searches over the experts of a mixture, and start rows that follow from the models."""

import json
from typing import Any

import pytest
from lm_eval.api.instance import Instance

from llmevo.config import read_config
from llmevo.engines.hf import HfEngine
from llmevo.merging.dense import RouterUse
from llmevo.merging.merger import Merger
from llmevo.merging.recipe import Recipe
from llmevo.merging.writer import write_model
from llmevo.models.references import ModelReference
from llmevo.models.sources import Sources
from llmevo.run.experiment import Experiment
from llmevo.run.scorer import Scorer
from llmevo.search.genome import Genome
from llmevo.search.prompts.question import SliceGeometry
from llmevo.search.space import SearchSpace
from llmevo.search.start_rows import by_router_use, mixture_in
from support.checkpoints import assert_same_bits, weights_of
from support.families import new_family
from support.workspace import Workspace

EXPERTS = [f"mixture#expert={place}" for place in range(4)]
SEARCH: dict[str, Any] = {"optimizer": "cma-es", "population": 2, "seed": 3}


@pytest.mark.parametrize(("family", "method"), [("Mixtral", "linear"), ("Qwen3-MoE", "ties")])
def test_a_search_over_experts_verifies_and_exports_what_it_scored(
    workspace: Workspace, family: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMEVO_HOME", str(workspace.root / "cache"))
    (new_family(workspace.root / "made", family) / "base").rename(workspace.root / "mixture")
    base = {"base_model": EXPERTS[0]} if method == "ties" else {}
    genome = {"models": EXPERTS, "merge_method": method, "layer_granularity": 1, "dtype": "float32", **base}
    config = workspace.config(genome=genome, search={**SEARCH, "budget": 9})
    status, printed = workspace.llmevo("run", config, "--out", "run")
    assert status == 0, printed
    assert "Measuring the use of the experts of mixture on" in printed
    state = workspace.state("run")
    rows = [trial.candidate for trial in state.trials.values() if trial.candidate.note == "router use"]
    assert len(rows) == 1
    assert state.started
    assert [row["name"] for row in state.started.start_from] == ["router use"]
    for span in ("0-0", "1-1"):
        weights = [value for name, value in rows[0].genes.items() if name.endswith(f"/{span}/weight")]
        if method == "linear":
            assert sum(weights) == pytest.approx(1.0, abs=1e-3)
            assert len(weights) == 4
    assert len({source["checksum"] for source in state.started.sources}) == 4
    assert workspace.llmevo("replay", "run", "--verify")[0] == 0

    best = max(number for number in state.trials)
    assert workspace.llmevo("export", "run", "out", "--candidate", best)[0] == 0
    again = dict(Merger(Sources(workspace.root)).merge(Recipe.model_validate(state.recipes[best])))
    assert_same_bits(weights_of(workspace.root / "out"), again)
    assert json.loads((workspace.root / "out" / "config.json").read_text())["model_type"] in ("mistral", "qwen3")
    status, printed = workspace.llmevo("inspect", config)
    assert status == 0, printed
    assert "the router of a mixture, which one expert does not need" in " ".join(printed.split())


@pytest.mark.vllm
@pytest.mark.parametrize("family", ["Mixtral", "Qwen3-MoE"])
def test_vllm_runs_merges_of_experts(workspace: Workspace, family: str) -> None:
    (new_family(workspace.root / "made", family) / "base").rename(workspace.root / "mixture")
    genome = {"models": EXPERTS, "merge_method": "linear", "layer_granularity": 1, "dtype": "float32"}
    scorer = Scorer(read_config(workspace.config(genome=genome, engine={"backend": "vllm"})), workspace.root)
    engine: Any = scorer.engine  # compared with an exported merge
    try:
        genes = {gene.name: 0.1 * (place + 1) for place, gene in enumerate(scorer.space.genes)}
        for recipe in (scorer.space.decode(genes), scorer.space.alone(ModelReference.parse(EXPERTS[2]))):
            out = workspace.root / f"out-{len(recipe.references)}"
            engine.swap(recipe)
            write_model(recipe, scorer.sources, out, 0)
            assert engine.differences(out) == []
            asked = [Instance("loglikelihood", {}, ("2 + 3 =", " the sum of both"), 0)]
            (mine, _), (wanted, _) = (
                of.lm.loglikelihood(asked)[0] for of in (engine, HfEngine(out, out, "float32", "cpu"))
            )
            assert mine == pytest.approx(wanted, abs=1e-3)
    finally:
        engine.close()


def test_the_average_by_use_has_the_mean_of_each_slice() -> None:
    models = ["m#expert=0", "m#expert=1", "other"]
    genome = Genome.model_validate({"models": models, "merge_method": "linear", "layer_granularity": 2})
    space = SearchSpace(genome, 4)
    use = RouterUse([[1.0, 0.0], [0.5, 0.5], [0.0, 0.0], [0.0, 0.8]], [[0.5, 0.5]] * 4, 1, 1, 0.0)
    (row,) = by_router_use(space, ModelReference.parse("m"), use)
    assert row.genes == {
        "m-expert0/0-1/weight": 0.75,
        "m-expert1/0-1/weight": 0.25,
        "other/0-1/weight": 0.0,
        "m-expert0/2-3/weight": 0.25,
        "m-expert1/2-3/weight": 0.75,
        "other/2-3/weight": 0.0,
    }


@pytest.mark.parametrize(
    ("models", "expected"),
    [(["m#expert=0", "m#expert=2"], "m"), (["m#expert=0", "n#expert=0"], None), (["m", "n"], None)],
)
def test_two_experts_of_one_mixture_have_a_common_use(models: list[str], expected: str | None) -> None:
    found = mixture_in(Genome.model_validate({"models": models, "merge_method": "linear"}))
    assert (found and str(found)) == expected


def test_an_expert_that_is_missing_is_one_line(workspace: Workspace) -> None:
    (new_family(workspace.root / "made", "Mixtral") / "base").rename(workspace.root / "mixture")
    genome = {"models": ["mixture#expert=0", "mixture#expert=9"], "merge_method": "linear"}
    status, printed = workspace.llmevo("run", workspace.config(genome=genome, search={**SEARCH, "budget": 9}))
    assert status == 2
    assert "mixture#expert=9: the mixture has 4 experts, #expert=0 to #expert=3" in " ".join(printed.split())


def test_the_weights_of_model_stock_are_a_start_row(workspace: Workspace) -> None:
    search = {**SEARCH, "budget": 8, "start_from": ["model_stock"]}
    status, printed = workspace.llmevo("run", workspace.config(search=search), "--out", "run")
    assert status == 0, printed
    state = workspace.state("run")
    row = next(trial.candidate for trial in state.trials.values() if trial.candidate.note == "model_stock")
    status, printed = workspace.llmevo("inspect", workspace.config(search=search), "--json")
    assert status == 0, printed
    found = json.loads(printed)
    assert len(found["model_stock"]) == 2
    for ratio, facts in zip(found["model_stock"], found["geometry"], strict=True):
        (cosine,) = facts["cosines"].values()
        expected = max(0.0, 2 * cosine / (1 + cosine)) / 2
        assert ratio == pytest.approx(2 * cosine / (1 + cosine), abs=1e-4)
        assert row.genes[f"one/{facts['slice']}/weight"] == pytest.approx(expected, abs=2e-4)
    assert (
        "Model Stock would give the models' mean this weight, by layer" in workspace.llmevo("inspect", "config.yml")[1]
    )
    assert workspace.llmevo("replay", "run", "--verify")[0] == 0


@pytest.mark.parametrize("optimizer", ["llm-off", "llm"])
def test_the_weights_of_model_stock_are_a_prior(workspace: Workspace, optimizer: str) -> None:
    search = {**SEARCH, "optimizer": optimizer, "budget": 9, "prior": "model_stock"}
    config = workspace.config(search=search, llm={"proposer": "simulated"})
    status, printed = workspace.llmevo("run", config, "--out", "run")
    assert status == 0, printed
    state = workspace.state("run")
    assert state.started
    presumed = Experiment.of_log(state.started, workspace.root / "run").presumed
    assert presumed == {
        f"{model}/{facts['slice']}/weight": pytest.approx(SliceGeometry(**facts).model_stock / 2, abs=1e-4)
        for facts in state.started.geometry
        for model in ("one", "two")
    }
    assert not [trial for trial in state.trials.values() if trial.candidate.note == "model_stock"]
    assert workspace.llmevo("replay", "run", "--verify")[0] == 0


def test_a_prior_needs_an_optimizer_that_has_one(workspace: Workspace) -> None:
    status, printed = workspace.llmevo("inspect", workspace.config(search={**SEARCH, "prior": "model_stock"}))
    assert status == 2
    assert "prior: cma-es has no prior" in " ".join(printed.split())
    genome = {"models": ["one", "two"], "merge_method": "linear", "dtype": "float32"}
    search = {**SEARCH, "optimizer": "llm-off", "budget": 8, "prior": "model_stock"}
    status, printed = workspace.llmevo("run", workspace.config(genome=genome, search=search))
    assert status == 2
    assert "search.prior: model_stock gives factors of task vectors" in " ".join(printed.split())


def test_the_ratios_of_model_stock_are_by_layer_where_the_search_has_one_slice(workspace: Workspace) -> None:
    genome = {"base_model": "base", "models": ["one", "two"], "merge_method": "task_arithmetic", "dtype": "float32"}
    found: list[list[float]] = []
    for layers in (0, 1):
        given = {"genome": {**genome, "layer_granularity": layers}, "search": {**SEARCH, "budget": 8}}
        status, printed = workspace.llmevo("inspect", workspace.config(**given), "--json")
        assert status == 0, printed
        found.append(json.loads(printed)["model_stock"])
    assert found[0] == found[1]
    assert len(found[0]) == 2


@pytest.mark.parametrize(
    ("cosines", "expected"),
    [((1.0,), 1.0), ((0.0,), 0.0), ((0.5,), 2 / 3), ((0.2, 0.2, 0.2), 0.6 / 1.4), ((-1.0,), 0.0), ((), 1.0)],
)
def test_the_ratio_of_model_stock(cosines: tuple[float, ...], expected: float) -> None:
    count = {0: 1, 1: 2, 3: 3}[len(cosines)]
    norms = {str(place): 1.0 for place in range(count)}
    facts = SliceGeometry("all", norms, {str(place): cosine for place, cosine in enumerate(cosines)})
    assert facts.model_stock == pytest.approx(expected)


def test_model_stock_needs_factors_of_task_vectors(workspace: Workspace) -> None:
    genome = {"models": ["one", "two"], "merge_method": "linear", "dtype": "float32"}
    config = workspace.config(genome=genome, search={**SEARCH, "budget": 8, "start_from": ["model_stock"]})
    status, printed = workspace.llmevo("run", config)
    assert status == 2
    assert "model_stock gives factors of task vectors, which linear has none of here" in " ".join(printed.split())
