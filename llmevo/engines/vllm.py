"""The vLLM engine: one running vLLM model whose weights are replaced in place."""

import gc
import importlib
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from transformers import AutoConfig

from llmevo.engines.hf import HfEngine
from llmevo.engines.scoring.vllm import VllmScorer
from llmevo.errors import CandidateError, ConfigError, MachineError, RecipeError, SourceError
from llmevo.merging.path import padded
from llmevo.merging.recipe import Recipe
from llmevo.merging.writer import MergedModel
from llmevo.models.placeholder import placeholder
from llmevo.models.references import load_pretrained
from llmevo.models.sources import Sources
from llmevo.models.tokenizer import load_tokenizer

DEFAULT_MAX_LENGTH = 4096
"""Tokens of a text by default, if the model holds as many: vLLM reserves memory for the longest possible text."""

RESERVED = frozenset({"model", "tokenizer", "dtype", "seed", "worker_extension_cls", "runner"})
"""Keywords of `vllm.LLM` that llmevo sets."""

ERRORS = {error.__name__: error for error in (RecipeError, SourceError, MachineError)}
"""The errors of a swap besides CandidateError: mistakes of the user's, and failures of the machine."""

NOISE = 0.1
"""Nats a token by which two engines may differ on the same weights in bfloat16 (measured: up to 0.05)."""

PROBES = (
    ("The capital of France is", " Paris."),
    ("Water boils at one hundred degrees and freezes at", " zero degrees."),
    ("def add(a, b):", " return a + b"),
    ("one two three four", " five six seven eight"),
)
"""Texts to compare engines by: every language model finds some of them likelier than others."""

ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # this process has threads, and may use a GPU
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # see `_keywords`
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
"""Environment variables that llmevo sets unless the user has."""

CPU_ENVIRONMENT = {
    # The first request for log-probabilities would wait 40 seconds for a C++ compiler.
    "TORCHDYNAMO_DISABLE": "1",
    # In this process vLLM starts in a third of the time and occupies no core for a second and third process.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
"""The same on CPU."""


class VllmEngine:
    """A vLLM model and its scorer. Use it on GPUs, and on any machine for tasks with much generation.

    vLLM's workers merge recipes and pass them to vLLM's own weight loaders, one tensor at a time. Only the parts of
    layers that a recipe changes are merged and loaded again.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: Path,
        dtype: str,
        root: Path = Path(),
        seed: int = 0,
        cache_gb: float = 2.0,
        options: Mapping[str, Any] | None = None,
        base: Path | None = None,
        by_token: Recipe | None = None,
        deepest: int | None = None,
    ) -> None:
        """`folder` gives the architecture, `tokenizer` the vocabulary, chat template and generation config, `dtype` the
        weights' type.

        References in recipes start at `root`; `seed` and `cache_gb` are the merger's. `options` are keywords of
        `vllm.LLM`, such as tensor_parallel_size, gpu_memory_utilization, max_model_len or enforce_eager. `base` is the
        folder of the model whose tensors results have, where that is not `folder`; `by_token` is a recipe of all models
        whose tokens differ: every recipe is merged with the tokens of this one. `deepest` is the most layers of a
        recipe, where `folder` is `deepened` to so many; shorter ones are filled up with layers that change nothing.
        Raises ConfigError when vLLM is missing or does not start.
        """
        vllm = _import_vllm()
        longest, keywords = _keywords(folder, options or {})
        if (tokenizer / "config.json").exists():
            keywords.setdefault("generation_config", str(tokenizer))
        vocabulary = load_tokenizer(tokenizer)
        try:
            with _starting(int(keywords.get("tensor_parallel_size", 1)) == 1):
                self._llm: Any = vllm.LLM(
                    model=str(folder), tokenizer=str(tokenizer), dtype=dtype, seed=seed, **keywords
                )
            models = by_token.as_dict() if by_token else None
            self._llm.collective_rpc(
                "open_sources",
                args=(str(folder), str(root.absolute()), seed, cache_gb, str(base or folder), models, deepest),
            )
        except Exception as error:  # any error of vLLM's configuration, its workers and their libraries
            raise ConfigError(f"{folder}: vLLM does not start ({error}); change engine.options") from error
        self._dtype = dtype
        self.lm = VllmScorer(self._llm, vllm.SamplingParams, vocabulary, longest, seed)

    def swap(self, recipe: Recipe, quantize: str = "", with_digest: bool = False) -> Mapping[str, Any]:
        """Merge the recipe into the running model; `quantize`: see `Engine.swap`. Raises CandidateError if that fails,
        and MachineError when memory or a file is lost; the next swap then replaces all weights.

        Returns the `seconds` in the worker, the number of `tensors` merged and, if requested, their `digest`.
        """
        if recipe.rope:
            raise CandidateError(
                "vLLM computes its rotary embedding when it starts; use `engine: {backend: hf}` for rope"
            )
        outcomes = self._llm.collective_rpc("swap_recipe", args=(recipe.as_dict(), quantize, with_digest))
        if not self._llm.reset_prefix_cache():  # its entries were computed with the old weights
            raise RuntimeError("vLLM did not reset its prefix cache, so its answers would mix two models")
        for outcome in outcomes:
            if outcome["error"] is not None and outcome["kind"] == "RecipeError" and outcome["path"]:
                raise CandidateError(outcome["error"])
            if outcome["error"] is not None:
                raise ERRORS.get(outcome["kind"], CandidateError)(outcome["error"])
        return outcomes[0]

    def reference(self, folder: Path) -> HfEngine:
        """Transformers' model of a folder in this engine's type, on the CPU."""
        if not _in_process():
            return HfEngine(folder, folder, self._dtype, "cpu")
        # Where vLLM has no model of its own, it runs transformers', whose class asks for vLLM's config from then on.
        config: Any = importlib.import_module("vllm.config")
        with config.set_current_vllm_config(self._llm.llm_engine.vllm_config):
            return HfEngine(folder, folder, self._dtype, "cpu")

    def differences(self, folder: Path) -> Sequence[str]:
        """The probe texts whose likelihood differs from that of the exported model by more than bfloat16's noise.

        Transformers runs the exported model on the CPU. Both engines round to the same type, but not in the same
        places.
        """
        reference = self.reference(folder)
        requests = [Instance("loglikelihood", {}, probe, 0) for probe in PROBES]
        own, other = self.lm.likelihoods(requests), reference.lm.likelihoods(requests)
        reference.close()
        counts = [len(self.lm.tok_encode(rest)) for _, rest in PROBES]
        return [
            f"{' '.join(probe)!r} ({mine:.2f} in vLLM, {exported:.2f} in transformers)"
            for probe, (mine, _), (exported, _), count in zip(PROBES, own, other, counts, strict=True)
            if not abs(mine - exported) <= NOISE * count + 0.02 * abs(exported)
            and not (math.isnan(mine) and math.isnan(exported))  # the model's own
        ]

    def close(self) -> None:
        """End vLLM and free its memory; the engine and its `lm` cannot be used afterwards."""
        if self._llm is None:
            return
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = self.lm.llm = None
        if _in_process():
            gc.collect()
            importlib.import_module("vllm.distributed").cleanup_dist_env_and_memory()


def deepened(recipe: Recipe, sources: Sources, depth: int) -> Path:
    """Return a folder of a model with more layers, for an engine with `deepest` layers: zeros in the cache.

    `recipe` is the model alone. Raises RecipeError where its config cannot describe so many layers, or where it is not
    known how to make a layer that changes nothing.
    """
    recipe = padded(recipe, depth, sources.depth(recipe.donor))
    model, donor = MergedModel(recipe, sources, trim=False), sources[recipe.donor]
    dtypes = {name: donor.dtype(origin) for name, origin in model.origins.items()}
    return placeholder(model.config(), model.shapes, dtypes)


def check_installed() -> None:
    """Raise ConfigError where vLLM is not installed. Imports nothing of it."""
    if find_spec("vllm") is None:
        raise _missing("it is not installed")


def _missing(reason: object) -> ConfigError:
    return ConfigError(
        f"engine.backend: vLLM cannot be imported ({reason}); in the clone of llmevo run `pip install '.[vllm]'` on a"
        " machine with a GPU, or `make vllm` on one without; or use the backend hf"
    )


def _import_vllm() -> Any:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("vllm")
    except ImportError as error:
        raise _missing(error) from error


def _on_cpu() -> bool:
    return importlib.import_module("vllm.platforms").current_platform.is_cpu()


def _in_process() -> bool:
    return os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0"


def longest_text(holds: int | None, options: Mapping[str, Any]) -> int:
    """The tokens of the longest text that vLLM reads, of a model that holds so many, with these keywords."""
    return int(options.get("max_model_len") or min(DEFAULT_MAX_LENGTH, holds or DEFAULT_MAX_LENGTH))


def _keywords(folder: Path, given: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """The longest text, and the keywords of `vllm.LLM`: the user's over defaults that suit scoring."""
    if taken := RESERVED & given.keys():
        raise ConfigError(f"engine.options: {', '.join(sorted(taken))} is set by llmevo; remove it")
    keywords: dict[str, Any] = {
        "worker_extension_cls": "llmevo.engines.vllm_worker.MergeWorker",
        "enable_prefix_caching": True,
        "use_tqdm_on_load": False,
    }
    if _on_cpu():
        # vLLM's own block of the prefix cache, 128 tokens, is longer than most questions, and its own key-value cache
        # takes most of the machine's memory.
        keywords |= {"enforce_eager": True, "block_size": 32, "kv_cache_memory_bytes": 1 << 30}
    config = load_pretrained(AutoConfig, folder).get_text_config()
    longest = longest_text(getattr(config, "max_position_embeddings", None), given)
    # vLLM requires room for one token after each text, though scoring computes nothing there.
    return longest, {**keywords, **given, "max_model_len": longest + 1}


@contextmanager
def _starting(alone: bool) -> Generator[None]:
    """The environment in which vLLM starts; `alone` if it needs only one worker."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if _on_cpu():
            for name, value in CPU_ENVIRONMENT.items():
                if alone or "MULTIPROCESSING" not in name:
                    os.environ.setdefault(name, value)
            compiler: Any = importlib.import_module("torch._dynamo.config")
            compiler.disable = True  # it may have read the variable before
        if _in_process():
            stack.enter_context(_no_messages())
            # vLLM 0.32 fails on this module of numba's when it searches all modules for its kernels.
            if ffi := sys.modules.pop("llvmlite.binding.ffi", None):
                stack.callback(sys.modules.__setitem__, "llvmlite.binding.ffi", ffi)
        else:
            # Spawned processes would run the user's script again, and need nothing of it.
            main = vars(sys.modules["__main__"])
            stack.callback(main.update, {key: main[key] for key in ("__spec__", "__file__") if key in main})
            main["__spec__"] = None
            main.pop("__file__", None)
        stack.callback(setattr, sys, "excepthook", sys.excepthook)  # torch.distributed replaces it
        stack.callback(setattr, torch, "set_num_threads", torch.set_num_threads)  # vLLM replaces it on CPU
        yield


@contextmanager
def _no_messages() -> Generator[None]:
    """Drop the messages that libraries, also C++ ones, write to standard error. Errors are raised."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with tempfile.TemporaryFile() as sink:
            os.dup2(sink.fileno(), 2)
            yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
