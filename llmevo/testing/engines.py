"""The contract of an engine."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from llmevo.engines.base import Engine
from llmevo.errors import CandidateError
from llmevo.merging.recipe import Recipe
from llmevo.merging.writer import write_model
from llmevo.models.checkpoints import Checkpoint, read_object
from llmevo.models.quantize import FORMATS, quantizer
from llmevo.models.sources import Sources

CONTEXTS = ("abc", "the quick brown fox", "0 1 2 0 1 2 ", "x")
CONTINUATIONS = ("a", " b", "12", " a longer one")


def requests(kind: Any, arguments: list[Any]) -> list[Any]:
    """lm-eval's requests of one kind."""
    from lm_eval.api.instance import Instance  # takes seconds to import

    return [Instance(request_type=kind, doc={}, arguments=given, idx=place) for place, given in enumerate(arguments)]


def answers(engine: Engine) -> tuple[list[tuple[float, bool]], list[str]]:
    """Log-likelihoods and generated texts of the running model."""
    pairs = [(context, continuation) for context in CONTEXTS for continuation in CONTINUATIONS]
    options = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
    texts = engine.lm.generate_until(requests("generate_until", [(context, options) for context in CONTEXTS]))
    return engine.lm.loglikelihood(requests("loglikelihood", pairs)), texts


def _rounded(model: Path, quantize: str, out: Path) -> Path:
    """Write an exported model with its weights rounded to a format."""
    checkpoint, config = Checkpoint(model), read_object(model / "config.json")
    served = quantizer(quantize, checkpoint.shapes, config)
    shutil.copytree(model, out)
    weights = {name: served.rounded(name, checkpoint.tensor(name)).clone() for name in checkpoint.shapes}
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return out


class EngineContract:
    """What an engine promises to the scorer. Subclass it with the fixtures `engine` and `model_folders`."""

    dtype = "float32"
    """The type of the engine's weights."""

    @pytest.fixture
    def model_folders(self) -> tuple[Path, Path]:
        """The folders of two models of one architecture."""
        raise NotImplementedError("give the subclass a fixture `model_folders` that returns the folders of two models")

    @pytest.fixture
    def engine(self, model_folders: tuple[Path, Path]) -> Engine:
        """An engine that runs one of the models and merges recipes of both."""
        raise NotImplementedError("give the subclass a fixture `engine` that returns a running engine")

    def mix(self, model_folders: tuple[Path, Path], *weights: float) -> Recipe:
        """A linear merge of the two models."""
        mixed = [{"model": str(m), "parameters": {"weight": w}} for m, w in zip(model_folders, weights, strict=True)]
        shared = {"merge_method": "linear", "dtype": self.dtype, "parameters": {"normalize": False}}
        return Recipe.model_validate({**shared, "models": mixed})

    def test_the_running_model_is_the_exported_one(
        self, engine: Engine, model_folders: tuple[Path, Path], tmp_path: Path
    ) -> None:
        first, second = self.mix(model_folders, 0.7, 0.3), self.mix(model_folders, 0.1, 0.9)
        write_model(first, Sources.open(first.references), tmp_path / "first", 0, trim=False)
        for recipe, is_first in ((first, True), (second, False), (first, True)):
            engine.swap(recipe)
            assert (not engine.differences(tmp_path / "first")) is is_first

    def test_a_quantized_model_is_the_exported_one_rounded(
        self, engine: Engine, model_folders: tuple[Path, Path], tmp_path: Path
    ) -> None:
        recipe = self.mix(model_folders, 0.7, 0.3)
        write_model(recipe, Sources.open(recipe.references), tmp_path / "plain", 0, trim=False)
        engine.swap(recipe)
        plain = answers(engine)
        for quantize in FORMATS:
            rounded = _rounded(tmp_path / "plain", quantize, tmp_path / quantize)
            engine.swap(recipe, quantize)
            assert not engine.differences(rounded), quantize
            assert answers(engine)[0] != plain[0], quantize
        engine.swap(recipe)
        assert answers(engine) == plain

    def test_answers_follow_from_the_recipe_alone(self, engine: Engine, model_folders: tuple[Path, Path]) -> None:
        first, second = self.mix(model_folders, 0.7, 0.3), self.mix(model_folders, 0.1, 0.9)
        engine.swap(first)
        before = answers(engine)
        engine.swap(second)
        assert answers(engine) != before
        engine.swap(first)
        assert answers(engine) == before

    def test_requests_are_answered_in_their_order(self, engine: Engine, model_folders: tuple[Path, Path]) -> None:
        engine.swap(self.mix(model_folders, 0.7, 0.3))
        scores, texts = answers(engine)
        assert len(scores) == len(CONTEXTS) * len(CONTINUATIONS)
        assert all(score <= 0 for score, _ in scores)
        assert all(isinstance(text, str) for text in texts)
        alone = engine.lm.loglikelihood(requests("loglikelihood", [(CONTEXTS[1], CONTINUATIONS[2])]))
        assert alone[0] == pytest.approx(scores[1 * len(CONTINUATIONS) + 2], rel=1e-2, abs=0.05)

    def test_a_merge_that_fails_costs_the_candidate_and_the_next_swap_repairs_it(
        self, engine: Engine, model_folders: tuple[Path, Path]
    ) -> None:
        good = self.mix(model_folders, 0.7, 0.3)
        engine.swap(good)
        before = answers(engine)
        with pytest.raises(CandidateError):
            engine.swap(self.mix(model_folders, 3e38, 3e38))  # more than float32 holds
        engine.swap(good)
        assert answers(engine) == before
