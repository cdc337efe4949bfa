"""The layers of the language model among all tensors, and models whose tensors are not all those of the base."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llmevo.errors import SourceError
from llmevo.models.architecture import (
    active_parameters,
    check_layers,
    depth_of,
    experts_of,
    is_stack_of_experts,
    routers_of,
    text_stack,
)
from llmevo.models.placement import PlacedModel
from llmevo.models.sources import Sources
from support.checkpoints import new_checkpoint, references, weights_of

VISION = ("blocks.{}.attn.qkv.weight", "merger.mlp.0.weight")
LAYER = "{}.mlp.up_proj.weight"


def numbered(template: str, count: int) -> list[str]:
    return [template.format(number) for number in range(count)]


@pytest.mark.parametrize(
    ("names", "start"),
    [
        (["wte.weight", *numbered("h.{}.attn.weight", 2)], "h."),
        (["transformer.wte.weight", *numbered("transformer.h.{}.attn.weight", 2)], "transformer.h."),
        (["backbone.embeddings.weight", *numbered("backbone.layers.{}.mixer.weight", 2)], "backbone.layers."),
        (["model.embed_tokens.weight", *numbered("model.layers.{}.a.weight", 2)], "model.layers."),
        # A tower as deep as the language model, and deeper ones.
        (
            [
                "model.embed_tokens.weight",
                *numbered("model.layers.{}.a.weight", 2),
                *numbered("visual.blocks.{}.b", 2),
                *numbered("visual.blocks.{}.c.weight", 2),
            ],
            "model.layers.",
        ),
        (
            [
                "model.language_model.embed_tokens.weight",
                *numbered("model.language_model.layers.{}.a.weight", 2),
                *numbered("model.visual.blocks.{}.a.weight", 5),
            ],
            "model.language_model.layers.",
        ),
        (
            [
                "language_model.model.embed_tokens.weight",
                *numbered("language_model.model.layers.{}.a.weight", 2),
                *numbered("vision_tower.vision_model.encoder.layers.{}.a.weight", 4),
            ],
            "language_model.model.layers.",
        ),
        # Numbers within a layer, prediction, and another language model in the same checkpoint.
        (["model.embed_tokens.weight", *numbered("model.layers.{}.mlp.experts.7.w1.weight", 2)], "model.layers."),
        (
            ["model.embed_tokens.weight", "model.layers.0.a.weight", "mtp.layers.0.a.weight", "mtp.layers.0.b.weight"],
            "model.layers.",
        ),
        (
            [
                "thinker.model.embed_tokens.weight",
                *numbered("thinker.model.layers.{}.a.weight", 2),
                "talker.model.embed_tokens.weight",
                *numbered("talker.model.layers.{}.a.weight", 3),
            ],
            "thinker.model.layers.",
        ),
    ],
)
def test_the_layers_of_the_language_model_are_found_by_name_place_and_depth(names: list[str], start: str) -> None:
    stack = text_stack(names, 1 if "mtp.layers.0.a.weight" in names else 2)
    assert stack.start == start
    assert [stack.layer(name) for name in names if name.startswith(start)] == [*range(stack.depth)]
    assert {stack.layer(name) for name in names if not name.startswith(start)} <= {None}


def test_tensors_of_several_token_prediction_are_told_from_layers() -> None:
    names = ["model.embed_tokens.weight", *numbered("model.layers.{}.a.weight", 3), "mtp.fc.weight"]
    stack = text_stack(names, 2)
    assert [name for name in names if stack.predicts(name)] == ["model.layers.2.a.weight", "mtp.fc.weight"]
    assert check_layers({"num_hidden_layers": 2, "num_nextn_predict_layers": 1}, names) == 2


def test_the_depth_of_a_multimodal_model_is_that_of_its_language_model() -> None:
    nested = {"vision_config": {"depth": 9}, "text_config": {"num_hidden_layers": 2}}
    assert depth_of(nested) == depth_of({"num_hidden_layers": 7, **nested}) == 2
    assert depth_of({"num_hidden_layers": 7, "vision_config": {}}) == 7  # as older Qwen2-VL has it
    with pytest.raises(SourceError, match=r"text_config.num_hidden_layers is 0"):
        depth_of({"text_config": {"num_hidden_layers": 0}})
    names = ["language_model.model.embed_tokens.weight", *numbered("language_model.model.layers.{}.a.weight", 3)]
    assert check_layers({"text_config": {}, "vision_config": {}}, names) == 3  # LLaVA leaves it to the default


@pytest.mark.parametrize(
    ("shapes", "filters"),
    [
        (
            {"mlp.gate.weight": (4, 8), "mlp.experts.0.up_proj.weight": (6, 8), "mlp.gate_proj.weight": (6, 8)},
            ["mlp.gate."],
        ),
        ({"mlp.router.weight": (4, 8), "mlp.router.bias": (4,), "mlp.experts.down_proj": (4, 6, 8)}, ["mlp.router."]),
        ({"moe.router.layer.weight": (4, 8), "moe.input_linear.weight": (4, 6, 8)}, ["moe.router."]),
        # A key projection with one row for each expert, and a short convolution with a channel for each.
        ({"self_attn.k_proj.weight": (4, 8), "mixer.conv1d.weight": (4, 1, 3)}, []),
    ],
)
def test_routers_are_found_next_to_the_experts(shapes: dict[str, tuple[int, ...]], filters: list[str]) -> None:
    config = {"num_hidden_layers": 2, "num_local_experts": 4}
    named = {f"model.layers.{layer}.{name}": shape for layer in range(2) for name, shape in shapes.items()}
    assert routers_of(named, config) == filters
    assert routers_of(named, {"num_hidden_layers": 2}) == []


@pytest.mark.parametrize(
    ("experts", "keys", "active"),
    [
        ({"mlp.experts.gate_up_proj": (4, 12, 8)}, {"num_experts_per_tok": 2}, 32 + 192),
        ({f"mlp.experts.{i}.down_proj.weight": (8, 6) for i in range(4)}, {"moe_topk": 1}, 32 + 48),
        ({f"mlp.experts.{i}.down_proj.weight": (8, 6) for i in range(4)}, {}, 32 + 192),
        ({"mlp.shared_experts.down_proj.weight": (8, 6)}, {"num_experts_per_tok": 2}, 32 + 48),
    ],
)
def test_a_token_passes_through_some_of_the_experts(
    experts: dict[str, tuple[int, ...]], keys: dict[str, int], active: int
) -> None:
    each = {"mlp.gate.weight": (4, 8), **experts}
    shapes = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in each.items()}
    shapes |= {"model.embed_tokens.weight": (50, 8), "model.norm.weight": (8,)}
    config = {"num_hidden_layers": 2, "num_local_experts": 4, "vocab_size": 50, "hidden_size": 8, **keys}
    assert active_parameters(config, shapes) == ([active, active], 400)


def test_one_tensor_of_all_experts_has_them_as_its_first_dimension() -> None:
    assert experts_of({"text_config": {"num_experts": 4}}) == 4
    assert is_stack_of_experts("mlp.experts.gate_up_proj", (4, 6, 8), 4)
    assert is_stack_of_experts("mlp.experts.gate_up_proj_bias", (4, 6), 4)
    for name, shape in (("mlp.gate.weight", (4, 8)), ("conv1d.weight", (4, 1, 3)), ("mlp.experts.down", (5, 6, 8))):
        assert not is_stack_of_experts(name, shape, 4)


# --- models whose tensors are not all those of the base -----------------------------------------------------------


def change(folder: Path, weights: Any, **config: Any) -> None:
    save_file({name: of.contiguous() for name, of in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


def opened(root: Path, *names: str, excluded: Iterable[str] = ()) -> tuple[Sources, PlacedModel]:
    first, second = references(*names)
    sources = Sources.open([first, second], root, lambda _, name: name in excluded)
    tower = sources[second]
    assert isinstance(tower, PlacedModel)
    assert tower.shapes == sources[first].shapes
    return sources, tower


def with_prediction(folder: Path, seed: int) -> None:
    """A model of three layers whose last one is a layer for multi-token prediction now."""
    new_checkpoint(folder, seed, layers=3)
    change(folder, weights_of(folder), num_hidden_layers=2, num_nextn_predict_layers=1)


def test_prediction_that_only_the_base_has_is_the_same_memory_there(tmp_path: Path) -> None:
    with_prediction(tmp_path / "base", 0)
    new_checkpoint(tmp_path / "one", 1, layers=2)
    sources, tower = opened(tmp_path, "base", "one")
    assert {*tower.fit.lent.values()} == {"model.layers.2"}
    name = "model.layers.2.mlp.up_proj.weight"
    assert tower.tensor(name).data_ptr() == sources[references("base")[0]].tensor(name).data_ptr()


def test_prediction_that_only_another_model_has_is_lost_on_purpose_only(tmp_path: Path) -> None:
    new_checkpoint(tmp_path / "base", 0, layers=2)
    with_prediction(tmp_path / "one", 1)
    with pytest.raises(SourceError, match=r"layers.*weight 0 for them by a filter"):
        Sources.open(references("base", "one"), tmp_path)
    extra = [name for name in weights_of(tmp_path / "one") if ".layers.2." in name]
    _, tower = opened(tmp_path, "base", "one", excluded=extra)
    assert tower.fit.left_out == dict.fromkeys(extra, "only in one, where its weight is 0")


def test_a_tied_head_is_the_embeddings(tmp_path: Path) -> None:
    new_checkpoint(tmp_path / "untied", 0)
    new_checkpoint(tmp_path / "tied", 1, tied=True)
    _, tower = opened(tmp_path, "untied", "tied")
    assert torch.equal(tower.tensor("lm_head.weight"), weights_of(tmp_path / "tied")["model.embed_tokens.weight"])
    change(tmp_path / "tied", weights_of(tmp_path / "tied"), tie_word_embeddings=False)
    with pytest.raises(SourceError, match=r"untied has an output head of its own .* is incomplete"):
        Sources.open(references("untied", "tied"), tmp_path)


def test_a_head_that_is_a_copy_of_the_embeddings_is_left_out_next_to_a_tied_base(tmp_path: Path) -> None:
    new_checkpoint(tmp_path / "tied", 0, tied=True)
    weights = weights_of(new_checkpoint(tmp_path / "copy", 1))
    change(tmp_path / "copy", weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    _, tower = opened(tmp_path, "tied", "copy")
    assert tower.fit.left_out == {"lm_head.weight": "in copy a copy of the embeddings, which are the head of tied"}


def test_models_saved_with_and_without_the_name_of_their_body_are_one_kind(tmp_path: Path) -> None:
    weights = weights_of(new_checkpoint(tmp_path / "base", 0))
    new_checkpoint(tmp_path / "one", 1)
    change(tmp_path / "one", {f"wrapped.{name}": of for name, of in weights.items()})
    _, tower = opened(tmp_path, "base", "one")
    assert all(torch.equal(tower.tensor(name), of) for name, of in weights.items())
