"""A config follows the layers of a result, or the result is refused."""

from typing import Any

import pytest

from llmevo.errors import SourceError
from llmevo.models.layer_kinds import rearranged, scale_rope


def config(**keys: Any) -> dict[str, Any]:
    return {"model_type": "llama", "num_hidden_layers": 8, **keys}


def test_lists_follow_the_layers() -> None:
    given = config(
        layer_types=list("aaabaaab"),
        no_rope_layers=[1, 1, 1, 0] * 2,
        mlp_only_layers=[0, 5],
        hybrid_override_pattern="M-M*M-M*",
        full_attention_interval=4,
    )
    made = rearranged(given, 8, [0, 1, 5, 3, 3])
    assert made == {
        "model_type": "llama",
        "num_hidden_layers": 5,
        "layer_types": ["a", "a", "a", "b", "b"],
        "no_rope_layers": [1, 1, 1, 0, 0],
        "mlp_only_layers": [0, 2],
        "hybrid_override_pattern": "M--**",
        "full_attention_interval": 4,
    }


def test_kinds_that_repeat_or_are_counted_follow_the_layers() -> None:
    given = config(
        block_types=["r", "r", "a"],
        attention_types=[[["g", "l"], 4]],
        attention_layers=list("glglglgl"),
        layer_rope_theta=[1.0, 2.0] * 4,
        hybrid_layer_ids=[2, 5],
    )
    made = rearranged(given, 8, [1, 2, 5])
    assert made["block_types"] == ["r", "a", "a"]
    assert made["attention_types"] == [[["l"], 1], [["g"], 1], [["l"], 1]]
    assert made["attention_layers"] == ["l", "g", "l"]
    assert made["layer_rope_theta"] == [2.0, 1.0, 2.0]
    assert made["hybrid_layer_ids"] == [1, 2]


def test_the_base_of_the_rotary_embedding_is_scaled_where_it_stands_or_from_the_default_of_the_class() -> None:
    for given, made in (
        (config(rope_theta=5e5), config(rope_theta=1e6)),
        (config(rope_scaling={"type": "linear"}), config(rope_scaling={"type": "linear"}, rope_theta=2e4)),
        (config(rope_parameters={}), config(rope_parameters={"rope_theta": 2e4})),
    ):
        scale_rope(given, 2.0)
        assert given == made
    with pytest.raises(SourceError, match="leave rope out"):
        scale_rope({"model_type": "gpt2"}, 2.0)


def test_the_lists_of_a_nested_config_follow_too() -> None:
    nested = {
        "model_type": "llava",
        "text_config": config(layer_types=list("abababab")),
        "vision_config": {"n_layer": 9},
    }
    made = rearranged(nested, 8, [0, 1, 2])
    assert made["text_config"]["num_hidden_layers"] == 3
    assert made["text_config"]["layer_types"] == ["a", "b", "a"]
    assert made["vision_config"] == {"n_layer": 9}


PERIOD = [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]
"""A period of four layers again."""

BROKEN = [0, 1, 2, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"full_attention_interval": 4}, "full_attention_interval is 4: layer 2 of the model would be layer 3"),
        (
            {"sliding_window_pattern": 4},
            "no layer_types that could say so; repeat, swap and leave out whole periods of 4",
        ),
        ({"sliding_window_pattern": "LLLG"}, "whole periods of 4 layers"),
        ({"attn_layer_period": 4, "attn_layer_offset": 2}, "attn_layer_period is 4: layer 2 of the model"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        ({"model_type": "gemma2"}, "sliding_window_pattern is 2"),
        ({"moe_layer_freq": 4}, "moe_layer_freq is 4: layer 3 of the model would be layer 4"),
        ({"moe_layer_end_index": 5}, "keep the layers after 5 last"),
        ({"first_k_dense_replace": 3}, "keep the first 3 layers first"),
        ({"num_dense_layers": 3}, "keep the first 3 layers first"),
        ({"global_attn_every_n_layers": 4}, "global_attn_every_n_layers is 4: layer 3 of the model would be layer 4"),
        ({"max_window_layers": 3, "use_sliding_window": True}, "max_window_layers is 3"),
    ],
)
def test_a_pattern_that_a_number_cannot_say_is_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(SourceError, match=said):
        rearranged(config(**keys), 8, BROKEN)
    if not {"first_k_dense_replace", "num_dense_layers", "max_window_layers", "moe_layer_end_index"} & keys.keys():
        assert rearranged(config(**keys), 8, PERIOD)["num_hidden_layers"] == 12


@pytest.mark.parametrize("key", ["num_kv_shared_layers", "scale_attn_by_inverse_layer_idx"])
def test_layers_that_depend_on_their_number_keep_their_order(key: str) -> None:
    with pytest.raises(SourceError, match=f"{key} is 2: layers depend on their number"):
        rearranged(config(**{key: 2}), 8, PERIOD)
    assert rearranged(config(**{key: 2}), 8, [*range(8)]) == config(**{key: 2})


@pytest.mark.parametrize(
    "keys",
    [
        {"full_attention_interval": 4, "layer_types": list("aaabaaab")},
        {"model_type": "gemma2", "layer_types": list("abababab")},
        {"max_window_layers": 3, "use_sliding_window": False},
        {"decoder_sparse_step": 1},
        {"moe_layer_end_index": 7},
        {"interleave_moe_layer_step": 2, "moe_layers": [1, 3, 5, 7]},
    ],
)
def test_a_number_whose_place_a_list_takes_does_not_matter(keys: dict[str, Any]) -> None:
    assert rearranged(config(**keys), 8, BROKEN)["num_hidden_layers"] == 9
