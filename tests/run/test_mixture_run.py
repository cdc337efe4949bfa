"""Runs whose candidates are mixtures of experts: their genes, log, exports and what is refused."""

import json
import shutil
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmevo.config import parse_config
from llmevo.engines.hf import HfEngine
from llmevo.errors import ConfigError
from llmevo.evaluation.score import Score
from llmevo.merging.merger import Merger
from llmevo.merging.mixture.mixture import ROUTER
from llmevo.merging.recipe import Recipe
from llmevo.models.sources import Sources
from llmevo.reports.html import figures
from llmevo.reports.html.analysis import Subject
from llmevo.run.calibration.routers import expert_scores
from llmevo.run.log.storage import RunLog
from llmevo.run.loop import carry_on
from llmevo.run.resume import prepare
from llmevo.search.encode import encode
from llmevo.search.genome import Genome
from llmevo.search.space import SearchSpace
from support.checkpoints import assert_same_bits, weights_of
from support.workspace import Workspace

GENOME: dict[str, Any] = {
    "base_model": "base",
    "models": ["one", "two"],
    "merge_method": "task_arithmetic",
    "layer_granularity": 1,
    "dtype": "float32",
    "architecture": "moe",
}


@pytest.fixture
def own_cache(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMEVO_HOME", str(workspace.root / "cache"))


@pytest.mark.usefixtures("own_cache")
def test_a_search_over_mixtures_verifies_and_exports_what_it_scored(workspace: Workspace) -> None:
    search = {"optimizer": "cma-es", "budget": 9, "population": 2, "seed": 3}
    genome = {**GENOME, "mixture": {"experts_per_token": [1, 2]}}
    config = workspace.config(genome=genome, search=search)
    status, printed = workspace.llmevo("inspect", config)
    assert status == 0, printed
    status, printed = workspace.llmevo("run", config, "--out", "run")
    assert status == 0, printed
    assert printed.count("Fitting the routers") == 1
    state = workspace.state("run")
    assert all(trial.score for trial in state.trials.values())
    assert state.started
    names = [gene["name"] for gene in state.started.genes]
    assert [name for name in names if "weight" not in name] == [
        "experts_per_token",
        *("0-0/temperature", "one/0-0/bias", "two/0-0/bias"),
        *("1-1/temperature", "one/1-1/bias", "two/1-1/bias"),
    ]
    assert workspace.llmevo("replay", "run", "--verify")[0] == 0

    best = state.best
    assert best
    recipe = Recipe.model_validate(state.recipes[best.candidate.id])
    assert recipe.mixture
    last = next(reversed(state.recipes))
    shutil.rmtree(workspace.root / "cache" / "routers")  # the run's folder has it
    status, printed = workspace.llmevo("export", "run", "out", "--candidate", last)
    assert status == 0, printed
    written = weights_of(workspace.root / "out")
    assert json.loads((workspace.root / "out" / "config.json").read_text())["architectures"] == ["MixtralForCausalLM"]
    status, printed = workspace.llmevo("merge", "out/best.yml", "again")
    assert status == 0, printed
    assert_same_bits(weights_of(workspace.root / "again"), written)
    assert (workspace.root / "run" / ROUTER).exists()

    shares = json.loads((workspace.root / "run" / "routing.json").read_text())
    assert shares["experts"] in (["one", "two"], [best.candidate.note] * 2)
    table = torch.tensor(shares["shares"]["letters_heldout"])
    torch.testing.assert_close(table.sum(-1), torch.ones(2))
    status, printed = workspace.llmevo("report", "run")
    assert status == 0, printed
    figure = figures.routing(Subject.of(workspace.root / "run"))
    assert figure
    assert figure["data"][0]["z"] == table.transpose(0, 1).tolist()  # a row for each expert, a column for each layer
    assert [len(row) for row in figure["data"][0]["text"]] == [2, 2]  # page.js measures the texts of heat maps
    assert "Which expert answers which task" in (workspace.root / "run" / "report.html").read_text()


@pytest.mark.usefixtures("own_cache")
def test_the_scored_mixture_is_the_exported_one_and_a_swap_loads_no_expert(workspace: Workspace) -> None:
    """Of the next candidate only what is merged and the routers are loaded; its weights are still the exported ones."""
    search = {"optimizer": "cma-es", "budget": 9, "population": 2, "seed": 3}
    status, printed = workspace.llmevo("run", workspace.config(genome=GENOME, search=search), "--out", "run")
    assert status == 0, printed
    state = workspace.state("run")
    recipes = [Recipe.model_validate(state.recipes[number]) for number in state.recipes]
    recipes = [
        of.with_router(str(workspace.root / "run" / ROUTER)) for of in recipes if of.mixture and of.mixture.router
    ]
    status, printed = workspace.llmevo("export", "run", "out", "--candidate", [*state.recipes][-1])
    assert status == 0, printed
    sources = Sources(workspace.root)
    engine = HfEngine(workspace.root / "out", workspace.root / "base", "float32", "cpu", Merger(sources))
    engine.swap(recipes[0])
    merger, loaded = Merger(sources), Merger(sources).digests(recipes[0])
    names = [name for name, _ in merger.merge(recipes[-1], loaded)]
    assert names
    assert not [name for name in names if ".experts." in name]
    engine.swap(recipes[-1])
    assert engine.differences(workspace.root / "out") == []
    tokens = torch.arange(4, 20)[None]
    exported = AutoModelForCausalLM.from_pretrained(workspace.root / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(engine.model(tokens).logits, exported(tokens).logits)


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("prepare", [["wudi"], {"steps": ["regmean"], "tasks": {"one": ["letters"]}}], ids=str)
def test_the_rest_of_a_mixture_is_of_prepared_models_and_its_experts_are_the_models_own(
    workspace: Workspace, prepare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = {"optimizer": "cma-es", "budget": 8, "population": 2, "seed": 3}
    genome = {**GENOME, "prepare": prepare, "mixture": {"layers": [[1, 2]]}}
    config = workspace.config(genome=genome, search=search)
    status, printed = workspace.llmevo("run", config, "--out", "run")
    assert status == 0, printed
    assert printed.count("Fitting the routers") == 1
    assert printed.count("Prepared 2 models in") == 1
    state = workspace.state("run")
    assert all(trial.score for trial in state.trials.values())
    assert state.started
    names = [gene["name"] for gene in state.started.genes]
    assert [name for name in names if "prepare" in name] == ["0-0/prepare", "1-1/prepare"]
    assert workspace.llmevo("replay", "run", "--verify")[0] == 0

    last = next(reversed(state.recipes))
    status, printed = workspace.llmevo("export", "run", "out", "--candidate", last)
    assert status == 0, printed
    written = weights_of(workspace.root / "out")
    shutil.rmtree(workspace.root / "cache" / "routers")  # another machine
    monkeypatch.setenv("LLMEVO_HOME", str(workspace.root / "other"))
    status, printed = workspace.llmevo("merge", "out/best.yml", "again")
    assert status == 0, printed
    assert_same_bits(weights_of(workspace.root / "again"), written)

    recipe = Recipe.model_validate(state.recipes[last]).with_router(str(workspace.root / "run" / ROUTER))
    if recipe.prepare and recipe.prepare.reads_text:
        recipe = recipe.with_text(str(workspace.root / "run" / "questions.json"))
    merger = Merger(Sources(workspace.root))
    engine = HfEngine(workspace.root / "out", workspace.root / "base", "float32", "cpu", merger)
    engine.swap(recipe)
    assert engine.differences(workspace.root / "out") == []
    rest = dict(merger.merge(recipe.model_copy(update={"mixture": None})))
    plain = dict(merger.merge(recipe.model_copy(update={"mixture": None, "prepare": None})))
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(written[name], rest[name])
    assert not torch.equal(written[name], plain[name])
    own = {model: weights_of(workspace.root / model) for model in ("one", "two")}
    matrices = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    for place, model in enumerate(("one", "two")):
        for projection, called in matrices.items():
            for layer, expected in ((0, rest), (1, own[model])):
                found = written[f"model.layers.{layer}.block_sparse_moe.experts.{place}.{called}.weight"]
                assert torch.equal(found, expected[f"model.layers.{layer}.mlp.{projection}.weight"])


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache")
def test_workers_score_the_same_mixtures_with_routers_that_are_fitted_once(workspace: Workspace) -> None:
    search = {"optimizer": "random", "budget": 8, "seed": 3, "order": "strict", "racing": None}
    genome = {**GENOME, "prepare": ["wudi"]}
    engine: dict[str, Any] = {"backend": "hf", "device": "cpu", "workers": 2, "self_check": False}
    status, printed = workspace.llmevo("run", workspace.config(genome=genome, search=search, engine=engine))
    assert status == 0, printed
    (router,) = (workspace.root / "cache" / "routers").iterdir()
    written = router.stat()
    engine["workers"] = 1
    config = workspace.config(genome=genome, search=search, engine=engine)
    status, printed = workspace.llmevo("run", config, "--out", "alone")
    assert status == 0, printed
    assert "Fitting the routers" not in printed
    assert [*(workspace.root / "cache" / "routers").iterdir()] == [router]
    assert router.stat().st_mtime_ns == written.st_mtime_ns
    first, second = (workspace.state(name) for name in ("runs/config", "alone"))
    assert {number: trial.score for number, trial in first.trials.items()} == {
        number: trial.score for number, trial in second.trials.items()
    }
    assert all(trial.score for trial in first.trials.values())
    routed = [(workspace.root / name / "routing.json").read_text() for name in ("runs/config", "alone")]
    assert routed[0] == routed[1]
    assert workspace.llmevo("replay", "runs/config", "--verify")[0] == 0


def test_a_parent_is_scored_as_the_dense_model_is(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMEVO_HOME", str(workspace.root / "cache"))
    search = {"optimizer": "cma-es", "budget": 7, "population": 2, "seed": 3, "racing": None}
    dense = {key: value for key, value in GENOME.items() if key != "architecture"}
    for name, genome in (("moe", GENOME), ("dense", dense)):
        status, printed = workspace.llmevo("run", workspace.config(genome=genome, search=search), "--out", name)
        assert status == 0, printed
    scores = [
        {t.candidate.note: t.value for t in workspace.state(run).trials.values() if t.candidate.origin == "parent"}
        for run in ("moe", "dense")
    ]
    assert scores[0].keys() == {"one", "two"}
    assert scores[0] == scores[1]


@pytest.mark.usefixtures("own_cache")
def test_parents_are_raced_alike_whether_the_routers_are_fitted_or_in_the_cache(workspace: Workspace) -> None:
    search = {"optimizer": "cma-es", "budget": 7, "seed": 3, "racing": {"error_rate": 0.45, "looks": 4}}
    config = workspace.config(genome=GENOME, search=search)
    runs: list[dict[int, Any]] = []
    for name in ("fitted", "cached"):
        status, printed = workspace.llmevo("run", config, "--out", name)
        assert status == 0, printed
        assert printed.count("Fitting the routers") == (name == "fitted")
        trials = workspace.state(name).trials
        runs.append(
            {number: trial.score and (trial.score.total, trial.score.items) for number, trial in trials.items()}
        )
    assert runs[0] == runs[1]


@pytest.mark.usefixtures("own_cache")
def test_a_finished_run_of_mixtures_needs_no_models_to_be_gone_on_with(workspace: Workspace) -> None:
    search = {"optimizer": "cma-es", "budget": 7, "seed": 3}
    assert workspace.llmevo("run", workspace.config(genome=GENOME, search=search), "--out", "run")[0] == 0
    config = workspace.root / "run" / "config.yml"
    before = (workspace.root / "run" / "routing.json").read_text()
    for model in ("base", "one", "two"):
        (workspace.root / model).rename(workspace.root / f"{model}-gone")
    with RunLog(workspace.root / "run", resume=True) as log:
        experiment = prepare(log)
        assert carry_on(experiment, log).finished
    assert (config.exists(), (workspace.root / "run" / "routing.json").read_text()) == (True, before)


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("optimizer", ["llm", "tpe"])
def test_other_optimizers_search_over_mixtures(workspace: Workspace, optimizer: str) -> None:
    """With filters and a choice of methods; an LLM is asked for the routers' genes like for all others."""
    methods = {"merge_method": ["task_arithmetic", "ties"], "filters": ["self_attn"], "layer_granularity": 0}
    config = workspace.config(
        genome={**GENOME, **methods},
        search={"optimizer": optimizer, "budget": 12, "population": 3, "seed": 3},
        llm={"proposer": "simulated"},
    )
    status, printed = workspace.llmevo("run", config, "--out", "run")
    assert status == 0, printed
    state = workspace.state("run")
    assert all(trial.score for trial in state.trials.values())
    assert bool(state.prompted) is (optimizer == "llm")
    if state.prompted:
        assert "temperature" in str(state.prompted[0].messages)
        assert any(trial.candidate.origin == "llm" for trial in state.trials.values())
    assert workspace.llmevo("replay", "run", "--verify")[0] == 0


def space(**changes: Any) -> SearchSpace:
    return SearchSpace(Genome.model_validate({**GENOME, **changes}), 4)


def test_a_recipe_of_mixtures_is_read_back_as_its_genes() -> None:
    of = space(layer_granularity=2, mixture={"experts_per_token": [1, 2], "layers": [[1, 4]]})
    genes = of.clamp({gene.name: gene.low + 0.3 * (gene.high - gene.low) for gene in of.genes})
    recipe = of.decode(genes)
    assert recipe.mixture
    assert recipe.mixture.layers == [(1, 4)]
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(4)]
    assert encode(of, recipe, names) == genes
    with pytest.raises(ValueError, match="no mixture of experts"):
        encode(of, recipe.model_copy(update={"mixture": None}), names)


@pytest.mark.parametrize(
    ("changes", "weight"),
    [
        ({}, 0.5),
        ({"prepare": ["wudi"]}, 0.5),
        ({"prepare": ["regmean"], "bounds": {"weight": [0, 1.6]}}, 1.0),
        ({"prepare": ["regmean"], "bounds": {"weight": [0, 0.9]}}, 0.5),
    ],
)
def test_the_merge_that_the_routers_are_fitted_on(changes: dict[str, Any], weight: float) -> None:
    """RegMean's own merge is the sum of what it prepares."""
    recipe = space(**changes).typical
    values, _ = recipe.values(recipe.output_slices(4)[0], "model.layers.0.self_attn.q_proj.weight", 0.0)
    assert values["weight"][:2] == [weight, weight]
    assert (recipe.prepare is None) == ("prepare" not in changes)


def test_a_model_that_is_only_an_expert_is_not_prepared(workspace: Workspace) -> None:
    models = [{"model": "one", "parameters": {"weight": 0.5}}]
    given = {"merge_method": "task_arithmetic", "base_model": "base", "models": models, "prepare": ["wudi"]}
    recipe = Recipe.model_validate({**given, "mixture": {"experts": ["two", "two"]}})
    assert [*map(str, recipe.references)] == ["base", "one", "two"]
    prepared = Merger(Sources(workspace.root)).prepared(recipe)
    assert prepared
    assert [*map(str, prepared.experts)] == ["one"]


def test_a_parent_is_a_mixture_of_copies_of_it() -> None:
    of = space()
    for model in of.genome.references:
        recipe = of.decode(of.parent(model)) if model in of.merged else of.alone(model)
        assert recipe.mixture
        assert recipe.mixture.references == [model]
        assert recipe.references == [model]


def test_experts_scores_are_by_question_and_by_task_where_a_metric_is_no_mean() -> None:
    scores = [
        Score(0.0, 0.0, {"a": {"acc,none": 0.5}, "b": {"f1,none": value}}, 4, {"a": [value, 1.0]})
        for value in (0.25, 0.75)
    ]
    counted = {"a": (1.0, "acc,none"), "b": (-1.0, "f1,none")}
    found = expert_scores(scores, {"a": 2, "b": 2}, {"a": 1.0, "b": -1.0}, counted)
    assert found.tolist() == [[0.25, 0.75], [1.0, 1.0], [-0.25, -0.75], [-0.25, -0.75]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"genome": {**GENOME, "mixture": {"experts_per_token": 3}}},
            "experts_per_token is 3, more than the 2 experts",
        ),
        ({"genome": {**GENOME, "mixture": {"experts": ["one", "three"]}}}, "three is none of the models"),
        ({"genome": {**GENOME, "mixture": {"temperature": [0, 1]}}}, "give a number over 0"),
        ({"genome": {**GENOME, "models": ["base", "one"]}}, "needs two experts or more"),
        ({"genome": {**GENOME, "architecture": "dense", "mixture": {}}}, "it goes with `architecture: moe`"),
        ({"genome": {**GENOME, "path": {}}}, "do not go together"),
        ({"engine": {"backend": "vllm"}}, "scored with engine.backend: hf"),
        ({"engine": {"on": "ray"}}, "routers are fitted on one machine"),
        (
            {
                "engine": {"workers": 2},
                "tasks": [{"name": "own", "weight": 1.0, "prompts": "prompts.txt", "judge": {"model": "a"}}],
            },
            "no worker asks the judge of own",
        ),
        ({"search": {"optimizer": "paths"}}, "choose an optimizer without paths"),
    ],
)
def test_a_wrong_config_of_mixtures_is_one_clear_line(changes: dict[str, Any], message: str) -> None:
    given = {"genome": GENOME, "tasks": [{"name": "letters", "weight": 1.0}], **changes}
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config(given, "config.yml")
    assert "\n" not in str(caught.value)


def test_models_without_a_class_of_mixtures_are_refused_before_the_run(workspace: Workspace) -> None:
    for model in ("base", "one", "two"):
        file = workspace.root / model / "config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**config, "model_type": "olmo2"}))
    status, printed = workspace.llmevo("run", workspace.config(genome=GENOME), "--out", "run")
    assert status == 2
    assert "no class of mixtures fits model_type 'olmo2'" in printed.replace("\n", " ")
    assert not (workspace.root / "run").exists()
