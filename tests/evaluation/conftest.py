"""Fixtures of tests that score models on tasks."""

import pytest

from llmevo.engines.scoring.hf import HfScorer
from support.tiny_model import tiny_llama, tiny_tokenizer


@pytest.fixture
def cached(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets are cached in a folder of the test's own."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def lm() -> HfScorer:
    return HfScorer(tiny_llama(max_position_embeddings=256), tiny_tokenizer())
