"""vLLM runs exported mixtures of experts and gives the likelihoods that transformers gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM

import llmevo
from llmevo.engines.scoring.hf import HfScorer
from llmevo.engines.vllm import PROBES, VllmEngine
from llmevo.models.tokenizer import load_tokenizer
from support.families import new_family


@pytest.mark.vllm
@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Qwen2"])
def test_vllm_serves_an_exported_mixture_with_the_same_likelihoods(name: str, tmp_path: Path) -> None:
    """With tied embeddings, and of Qwen2 with a shared expert."""
    root = new_family(tmp_path, name, tie_word_embeddings=True)
    experts = [
        {"source_model": str(root / model), "positive_prompts": [prompt]}
        for model, prompt in (("one", "add two numbers"), ("two", "spell a word"))
    ]
    given: dict[str, Any] = {"base_model": str(root / "base"), "experts": experts, "gate_mode": "inputs"}
    if name == "Qwen2":
        given["shared_experts"] = [{"source_model": str(root / "base"), "positive_prompts": ["a text"]}]
    (tmp_path / "moe.yml").write_text(yaml.safe_dump({**given, "dtype": "float32"}))
    llmevo.merge(tmp_path / "moe.yml", tmp_path / "out")
    asked = [Instance("loglikelihood", {}, probe, 0) for probe in PROBES]
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    wanted = [score for score, _ in HfScorer(model, load_tokenizer(tmp_path / "out")).loglikelihood(asked)]
    engine = VllmEngine(tmp_path / "out", tmp_path / "out", "float32")
    try:
        found = [score for score, _ in engine.lm.loglikelihood(asked)]
    finally:
        engine.close()
    assert found == pytest.approx(wanted, abs=1e-3)
