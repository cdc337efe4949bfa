"""A mixture is made one dense model by what its routers use."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from llmevo.cli.app import app
from llmevo.errors import LlmevoError
from llmevo.export.dense import Way, make_dense
from llmevo.export.merge import merge
from llmevo.merging.dense import RouterUse, average, expert_of
from llmevo.merging.preparation.texts import Texts
from llmevo.models.references import ModelReference
from llmevo.models.sources import Sources
from llmevo.run.calibration.router_use import router_use
from support.checkpoints import assert_same_bits, quietly, weights_of
from support.families import new_family

TEXTS = Texts({"one": ["3 + 4 =", "the sum", "ab"], "two": ["a cat sat", "x"]})


def mixture(tmp_path: Path, family: str = "Mixtral", **changes: Any) -> ModelReference:
    return ModelReference.parse(str(new_family(tmp_path, family, **changes) / "base"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "texts.json"
    file.write_text(json.dumps(TEXTS.tasks))
    return file


@pytest.mark.parametrize(("family", "sums"), [("Mixtral", True), ("Qwen3-MoE", False)])
def test_the_use_is_what_the_routers_say(
    family: str, sums: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMEVO_HOME", str(tmp_path / "cache"))
    of = mixture(tmp_path, family)
    said: list[str] = []
    use = router_use(of, Path(), TEXTS, "cpu", said.append)
    model: Any = quietly(lambda: AutoModelForCausalLM.from_pretrained(of.model.path))
    tokenizer: Any = AutoTokenizer.from_pretrained(of.model.path)
    medians, means = [], []
    for each in TEXTS.all:
        found = model(**tokenizer(each, return_tensors="pt"), output_router_logits=True)
        logits = torch.stack([*found.router_logits]).detach()  # layers, tokens, experts
        kept = torch.zeros_like(logits).scatter(2, logits.topk(2, dim=2).indices, 1.0)
        medians.append(((logits / 0.1).softmax(2) * kept).quantile(0.5, dim=1))
        weights = logits.softmax(2) * kept
        means.append(weights / weights.sum(2, keepdim=True) if sums else weights)
    torch.testing.assert_close(torch.tensor(use.median), torch.stack(medians).mean(0), atol=2e-5, rtol=0)
    torch.testing.assert_close(torch.tensor(use.mean), torch.cat(means, 1).mean(1), atol=2e-5, rtol=0)
    assert (use.texts, use.tokens) == (5, sum(map(len, TEXTS.all)))
    assert (abs(use.mass(0) - 1.0) < 1e-4) == sums
    assert len(said) == 1
    again = router_use(of, Path(), TEXTS, "cpu", said.append)
    assert (again.mean, again.seconds, len(said)) == (use.mean, 0.0, 1)
    config = Path(of.model.path) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_experts_per_tok": 1}))
    other = router_use(of, Path(), TEXTS, "cpu", said.append)
    assert len(said) == 2
    assert other.mean != use.mean


def test_an_average_has_the_experts_of_each_layer_by_their_use(tmp_path: Path, text: Path) -> None:
    of = mixture(tmp_path)
    out = tmp_path / "dense"
    recipe, use = make_dense(of, out, "average", text=text, device="cpu")
    assert use
    merged, sources = load_file(out / "model.safetensors"), Sources()
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        each = [sources[expert_of(of, place)].tensor(name) for place in range(4)]
        mean = sum(weight * tensor for weight, tensor in zip(use.weights(layer), each, strict=True))
        torch.testing.assert_close(merged[name], mean, atol=1e-5, rtol=1e-5)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(merged[name], sources[expert_of(of, 0)].tensor(name))
    assert recipe.merge_method == "linear"


def test_what_the_mixture_adds_is_kept_where_its_weights_do_not_add_up_to_1(tmp_path: Path, text: Path) -> None:
    of = mixture(tmp_path, "Qwen3-MoE")
    recipe, use = make_dense(of, tmp_path / "dense", "average", text=text, device="cpu")
    assert use
    assert [slice_.gains.mlp if slice_.gains else 1.0 for slice_ in recipe.slices or []] == pytest.approx(
        [use.mass(0), use.mass(1)], abs=1e-5
    )
    wide, _ = make_dense(of, tmp_path / "wide", "widen", text=text, device="cpu")
    assert (wide.slices or [])[1].parameters == {"scale": pytest.approx(use.mass(1), abs=1e-5)}


def test_a_layer_whose_medians_are_0_has_the_mean_use() -> None:
    use = RouterUse([[0.0, 0.0], [0.9, 0.0]], [[0.75, 0.25], [0.5, 0.5]], 1, 1, 0.0)
    assert [use.weights(layer) for layer in range(2)] == [[0.75, 0.25], [1.0, 0.0]]
    recipe = average(ModelReference.parse("m"), use)
    assert [[str(source.model) for source in of.sources] for of in recipe.slices or []] == [
        ["m#expert=0", "m#expert=1"],
        ["m#expert=0"],
    ]


def test_the_most_used_experts_are_widened(tmp_path: Path, text: Path) -> None:
    of = mixture(tmp_path)
    recipe, use = make_dense(of, tmp_path / "wide", "widen", text=text, experts=3, device="cpu")
    assert use
    for layer, slice_ in enumerate(recipe.slices or []):
        found = [source.model.model.expert for source in slice_.sources]
        assert found == sorted(range(4), key=lambda place, row=use.mean[layer]: -row[place])[:3]
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["intermediate_size"] == 3 * 96
    merge(tmp_path / "wide" / "mergekit_config.yml", tmp_path / "again")
    assert_same_bits(weights_of(tmp_path / "wide"), weights_of(tmp_path / "again"))


def test_the_command_writes_each_kind(tmp_path: Path, text: Path) -> None:
    of = mixture(tmp_path)
    for by, options in {"uniform": (), "expert": ("--expert", "3"), "widen": ("--text", str(text))}.items():
        done = CliRunner().invoke(app, ["dense", str(of), str(tmp_path / by), "--by", by, *options])
        assert done.exit_code == 0, done.output
        assert ("The routers' use of 4 experts" in done.output) == (by == "widen")
    alone = load_file(tmp_path / "expert" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(alone, Sources()[expert_of(of, 3)].tensor("model.layers.0.mlp.up_proj.weight"))


@pytest.mark.parametrize(
    ("family", "by", "options", "message"),
    [
        ("Mixtral", "widen", {"experts": 5}, "--experts: 5 of the 4 experts of"),
        ("Mixtral", "widen", {"experts": 0}, "give 1 to 4"),
        ("Mixtral", "average", {"text": None}, "give --text FILE"),
        ("Mixtral", "average", {"text": "no.txt"}, "--text: no.txt cannot be read (No such file or directory);"),
        ("Mixtral", "average", {"experts": 3}, "--experts 3: --by average does not use it; leave it out"),
        ("Mixtral", "widen", {"expert": 0}, "--expert 0: --by widen does not use it"),
        ("Mixtral", "uniform", {"text": "no.txt"}, "--text no.txt: --by uniform does not use it"),
        ("Mixtral", "expert", {"expert": 9}, "the mixture has 4 experts, #expert=0 to #expert=3"),
        ("Llama", "uniform", {}, "the model is dense"),
        ("Qwen2-MoE", "average", {}, "each of its layers has a shared expert"),
    ],
)
def test_what_cannot_be_made_dense_is_refused(
    family: str, by: Way, options: dict[str, Any], message: str, tmp_path: Path, text: Path
) -> None:
    of = mixture(tmp_path, family)
    given: dict[str, Any] = {**({"text": text} if by in ("average", "widen") else {}), **options}
    with pytest.raises(LlmevoError, match=re.escape(message)):
        make_dense(of, tmp_path / "dense", by, **given)
    assert not (tmp_path / "dense").exists()


@pytest.mark.parametrize("family", [None, "Llama", "Qwen2-MoE"])
def test_a_refusal_names_the_model_as_it_was_given(family: str | None, tmp_path: Path) -> None:
    named = str(mixture(tmp_path, family)) if family else "nowhere"
    with pytest.raises(LlmevoError) as refused:
        make_dense(named, tmp_path / "dense", "uniform", device="cpu")
    assert str(refused.value).startswith(f"{named}: ")
