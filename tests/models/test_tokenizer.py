"""The number of tokens in a model's config."""

from typing import Any

import pytest

from llmevo.models.tokenizer import vocabulary_size, with_vocabulary_size


@pytest.mark.parametrize(
    ("config", "size", "changed"),
    [
        ({"vocab_size": 10}, 10, {"vocab_size": 12}),
        ({"text_config": {"vocab_size": 10, "n": 1}}, 10, {"text_config": {"vocab_size": 12, "n": 1}}),
        (
            {"vocab_size": 9, "llm_config": {"vocab_size": 10}},
            10,
            {"vocab_size": 12, "llm_config": {"vocab_size": 12}},
        ),
        (
            {"thinker_config": {"text_config": {"vocab_size": 10}}},
            10,
            {"thinker_config": {"text_config": {"vocab_size": 12}}},
        ),
        ({"vocab_size": 10, "text_config": {}}, 10, {"vocab_size": 12, "text_config": {"vocab_size": 12}}),
        ({}, 0, {"vocab_size": 12}),
    ],
    ids=str,
)
def test_the_language_models_own_config_names_it(config: dict[str, Any], size: int, changed: dict[str, Any]) -> None:
    before = repr(config)
    assert vocabulary_size(config) == size
    assert with_vocabulary_size(config, 12) == changed
    assert repr(config) == before
