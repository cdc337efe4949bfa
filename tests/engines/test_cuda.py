"""The transformers engine on a CUDA device: the merges, likelihoods, texts and scores of the CPU."""

import pytest
import torch
from lm_eval.api.instance import Instance

from llmevo.engines.hf import HfEngine
from llmevo.merging.merger import Merger
from llmevo.merging.recipe import Recipe
from llmevo.merging.writer import write_model
from llmevo.models.sources import Sources
from support.workspace import Workspace

pytestmark = pytest.mark.gpu

RECIPE = {
    "merge_method": "linear",
    "models": [{"model": name, "parameters": {"weight": weight}} for name, weight in (("one", 0.7), ("two", 0.3))],
    "dtype": "float32",
}
LIKELIHOODS = [("abc", " a"), ("abc", " longer"), ("the quick brown fox", "1"), ("", "b")]
TEXTS = [("abc", {"until": ["\n"], "max_gen_toks": 8}), ("the quick brown fox", {"until": [], "max_gen_toks": 8})]


def test_a_merge_on_cuda_answers_as_on_the_cpu(workspace: Workspace) -> None:
    sources, recipe = Sources(workspace.root), Recipe.model_validate(RECIPE)
    likelihoods: dict[str, list[tuple[float, bool]]] = {}
    texts: dict[str, list[str]] = {}
    write_model(recipe, sources, workspace.root / "out", 0)
    for device in ("cpu", "cuda"):
        folder = workspace.root / "one"
        engine = HfEngine(folder, folder, "float32", device, Merger(sources, 0))
        engine.swap(recipe)
        assert {weight.device.type for weight in engine.model.parameters()} == {device}
        assert list(engine.differences(workspace.root / "out")) == []
        asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(LIKELIHOODS)]
        likelihoods[device] = engine.lm.loglikelihood(asked)
        texts[device] = engine.lm.generate_until(
            [Instance("generate_until", {}, pair, i) for i, pair in enumerate(TEXTS)]
        )
    assert texts["cuda"] == texts["cpu"]
    for found, expected in zip(likelihoods["cuda"], likelihoods["cpu"], strict=True):
        assert found[0] == pytest.approx(expected[0], rel=1e-3, abs=1e-3)
        assert found[1] == expected[1]


def test_a_run_on_cuda_scores_its_start_rows_as_on_the_cpu(workspace: Workspace) -> None:
    for device in ("cpu", "cuda"):
        config = workspace.config(engine={"backend": "hf", "device": device})
        status, printed = workspace.llmevo("run", config, "--out", device)
        assert status == 0, printed
    cuda, cpu = workspace.state("cuda"), workspace.state("cpu")
    for number in range(4):
        assert cuda.candidates[number] == cpu.candidates[number]
        assert cuda.trials[number].value == cpu.trials[number].value
    assert torch.cuda.max_memory_allocated() > 0
    assert workspace.llmevo("replay", "cuda", "--verify")[0] == 0
    status, printed = workspace.llmevo("export", "cuda", "out")
    assert status == 0, printed
