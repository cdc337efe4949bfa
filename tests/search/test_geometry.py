"""Norms and cosines of task vectors, slice by slice, and where they are logged and shown."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llmevo.config import read_config
from llmevo.models.sources import Sources
from llmevo.run.experiment import Experiment
from llmevo.run.log.events import RunStarted
from llmevo.search.genome import Genome
from llmevo.search.geometry import measure
from llmevo.search.prompts.question import SliceGeometry
from llmevo.search.space import SearchSpace
from support.checkpoints import merged_by_peft, new_adapter, new_checkpoint, weights_of
from support.fake_server import chat, serving
from support.workspace import Workspace

LAYERS = 4


def space(*models: str, **keys: Any) -> SearchSpace:
    genome = {
        "models": [*models],
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "layer_granularity": 2,
        **keys,
    }
    return SearchSpace(Genome.model_validate(genome), LAYERS)


def measured(root: Path, over: SearchSpace, **options: Any) -> list[SliceGeometry]:
    return measure(over, Sources.open(over.genome.references, root), **options)


def of_slice(weights: dict[str, Tensor], first: int) -> Tensor:
    """All tensors of two layers as one vector."""
    names = [name for name in sorted(weights) if f"layers.{first}." in name or f"layers.{first + 1}." in name]
    return torch.cat([weights[name].double().reshape(-1) for name in names])


def expected(base: Tensor, first: Tensor, second: Tensor) -> tuple[float, float, float]:
    """Both norms and the cosine, with the means in the plainest way."""
    one, two = first - base, second - base
    return float(one.norm() / base.norm()), float(two.norm() / base.norm()), float(one @ two / one.norm() / two.norm())


def numbers(facts: SliceGeometry) -> list[float]:
    return [*facts.norms.values(), *facts.cosines.values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_full_models_are_compared_with_their_base(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = [
        weights_of(new_checkpoint(tmp_path / name, seed, dtype=dtype)) for seed, name in enumerate(("base", "a", "b"))
    ]
    facts = measured(tmp_path, space("a", "b"))
    assert [f.slice for f in facts] == ["0-1", "2-3"]
    assert [*facts[0].norms, *facts[0].cosines] == ["a", "b", "a/b"]
    for first, found in zip((0, 2), facts, strict=True):
        assert numbers(found) == pytest.approx(expected(*(of_slice(w, first) for w in weights)), abs=1e-4)


def test_adapters_are_compared_by_their_factors_as_exactly_as_whole_models(tmp_path: Path) -> None:
    base = new_checkpoint(tmp_path / "base", 0)
    for seed, name in enumerate(("one", "two")):
        new_adapter(tmp_path / name, base, seed)
    whole = [weights_of(base), *(merged_by_peft(base, tmp_path / name) for name in ("one", "two"))]
    facts = measured(tmp_path, space("base+one", "base+two"))
    for first, found in zip((0, 2), facts, strict=True):
        assert numbers(found) == pytest.approx(expected(*(of_slice(w, first) for w in whole)), abs=1e-4)
        assert min(found.norms.values()) > 0.01


def test_an_adapter_and_a_whole_model_are_compared_as_well(tmp_path: Path) -> None:
    base, full = new_checkpoint(tmp_path / "base", 0), new_checkpoint(tmp_path / "full", 1)
    new_adapter(tmp_path / "one", base, 0)
    whole = [weights_of(base), merged_by_peft(base, tmp_path / "one"), weights_of(full)]
    (facts, _) = measured(tmp_path, space("base+one", "full"))
    assert numbers(facts) == pytest.approx(expected(*(of_slice(w, 0) for w in whole)), abs=1e-4)


def test_without_a_base_the_vectors_start_at_the_mean_of_the_models(tmp_path: Path) -> None:
    weights = [weights_of(new_checkpoint(tmp_path / name, seed)) for seed, name in enumerate(("a", "b"))]
    first, second = (of_slice(w, 0) for w in weights)
    (facts, _) = measured(tmp_path, space("a", "b", merge_method="linear", base_model=None))
    assert numbers(facts) == pytest.approx(expected((first + second) / 2, first, second), abs=1e-4)
    assert facts.cosines["a/b"] == -1.0  # of two models always


def test_a_model_that_is_its_base_has_norm_and_cosine_zero(tmp_path: Path) -> None:
    base = new_checkpoint(tmp_path / "base", 0)
    new_checkpoint(tmp_path / "copy", 0)
    new_adapter(tmp_path / "one", base, 0)
    (facts, _) = measured(tmp_path, space("copy", "base+one"))
    assert (facts.norms["copy"], facts.cosines["copy/one"]) == (0.0, 0.0)


def test_the_base_among_the_models_has_no_vector_of_its_own(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a")):
        new_checkpoint(tmp_path / name, seed)
    (facts, _) = measured(tmp_path, space("base", "a", merge_method="linear"))
    assert ([*facts.norms], facts.cosines) == (["a"], {})


def test_a_large_model_is_sampled_always_alike_and_in_every_slice(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        new_checkpoint(tmp_path / name, seed)
    some = measured(tmp_path, space("a", "b"), entries=1000)
    assert some == measured(tmp_path, space("a", "b"), entries=1000)
    assert some != measured(tmp_path, space("a", "b"))
    assert all(norm > 0 for facts in some for norm in facts.norms.values())


def test_a_tensor_that_is_not_finite_is_left_out(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        new_checkpoint(tmp_path / name, seed)
    sound = measured(tmp_path, space("a", "b"))
    weights = weights_of(tmp_path / "a")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    facts = measured(tmp_path, space("a", "b"))
    assert all(0 < norm < 10 for norm in facts[0].norms.values())
    assert facts[1] == sound[1]


# In a run


def chat_config(workspace: Workspace, url: str) -> Path:
    return workspace.config(
        heldout=None, llm={"proposer": "openai", "base_url": url}, search={"budget": 8, "population": 5}
    )


def test_a_run_logs_the_geometry_shows_it_to_a_chat_model_and_reads_it_back_without_the_models(
    workspace: Workspace,
) -> None:
    with serving(chat("no idea")) as server:
        status, printed = workspace.llmevo("run", chat_config(workspace, server.url), "--out", "run")
        assert status == 0, printed
        prompt = str(server.requests[-1])
    started = workspace.state("run").started
    assert started is not None
    assert [facts["slice"] for facts in started.geometry] == ["0-0", "1-1"]
    size = round(10_000 * started.geometry[0]["norms"]["one"])
    assert f"- layers 0-0: one {size}, two" in prompt
    experiment = Experiment.of_log(started, Path("run"))
    for name in ("base", "one", "two"):
        (workspace.root / name / "model.safetensors").unlink()
    assert experiment.geometry[0].norms == started.geometry[0]["norms"]


def test_a_base_model_that_completes_patterns_needs_no_geometry(workspace: Workspace) -> None:
    experiment = Experiment(read_config(workspace.config()), workspace.root)
    assert experiment.started().geometry == []


def test_a_log_of_before_has_no_geometry_and_is_read_all_the_same(workspace: Workspace) -> None:
    old = Experiment(read_config(workspace.config()), workspace.root).started().model_dump(mode="json", by_alias=True)
    del old["geometry"]
    started = RunStarted.model_validate(old)
    assert Experiment.of_log(started, Path("run")).geometry == []


def test_inspect_shows_the_geometry(workspace: Workspace) -> None:
    status, printed = workspace.llmevo("inspect", workspace.config())
    assert status == 0, printed
    assert "Size of the task vectors, against the base" in printed
    lines = [line.split() for line in printed.splitlines() if line.strip().startswith("1-1 ")]
    assert [len(line) for line in lines] == [3, 2]  # the sizes of both, and their cosine
    assert all(word.endswith("%") for word in lines[0][1:])
    assert "a one, b two" in printed
