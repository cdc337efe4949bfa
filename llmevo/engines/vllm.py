"""The vLLM engine: one vLLM model that runs on while its weights are merged anew."""

import gc
import importlib
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from transformers import AutoConfig

from llmevo.engines.hf import HfEngine
from llmevo.engines.scoring.vllm import VllmScorer
from llmevo.errors import CandidateError, ConfigError, MachineError, RecipeError, SourceError
from llmevo.merging.recipe import Recipe
from llmevo.models.references import load_pretrained
from llmevo.models.tokenizer import load_tokenizer

LONGEST = 4096
"""Tokens of a text by default, if the model holds as many: vLLM keeps memory free for the longest text there may be."""

CPU_BLOCK = 32
"""Tokens in a block of the prefix cache on CPU, where vLLM's own 128 is longer than most questions."""

CPU_CACHE = 1 << 30
"""Bytes of key-value cache on CPU, where vLLM would take most of the machine's memory."""

OURS = frozenset({"model", "tokenizer", "dtype", "seed", "worker_extension_cls", "runner"})
"""Keywords of `vllm.LLM` that are no options."""

ERRORS = {error.__name__: error for error in (RecipeError, SourceError, MachineError)}
"""What a swap raises besides CandidateError: mistakes of the user's, and failures of the machine."""

NOISE = 0.1
"""Nats a token that two engines may differ by on the same weights in bfloat16 (measured: up to 0.05)."""

PROBES = (
    ("The capital of France is", " Paris."),
    ("Water boils at one hundred degrees and freezes at", " zero degrees."),
    ("def add(a, b):", " return a + b"),
    ("one two three four", " five six seven eight"),
)
"""Texts that any model of a language finds more or less likely, to compare engines by."""

ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # this process has threads, maybe a GPU
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # see `_keywords`
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
"""Environment variables, where the user has not set them."""

CPU_ENVIRONMENT = {
    # The first request for log-probabilities would wait 40 seconds for a C++ compiler.
    "TORCHDYNAMO_DISABLE": "1",
    # In this process vLLM starts in a third of the time and keeps no core free for its second and third process.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
"""The same on CPU."""


class VllmEngine:
    """A vLLM model and its request scorer. Use it on GPUs, and for tasks that generate much on any machine.

    Recipes are merged inside vLLM's workers and go into vLLM's own weight loaders, one tensor at a time. Only the
    parts of layers that a recipe changes are merged and loaded again.
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
    ) -> None:
        """`folder` gives the architecture, `tokenizer` the vocabulary and chat template, `dtype` the weights' type.

        References in recipes start at `root`; `seed` and `cache_gb` are the merger's. `options` are keywords of
        `vllm.LLM`, such as tensor_parallel_size, gpu_memory_utilization, max_model_len or enforce_eager.
        Raises ConfigError when vLLM is missing or does not start.
        """
        vllm = _import_vllm()
        longest, keywords = _keywords(folder, options or {})
        vocabulary = load_tokenizer(tokenizer)
        try:
            with _starting(int(keywords.get("tensor_parallel_size", 1)) == 1):
                self._llm: Any = vllm.LLM(
                    model=str(folder), tokenizer=str(tokenizer), dtype=dtype, seed=seed, **keywords
                )
            self._llm.collective_rpc("open_sources", args=(str(folder), str(root.absolute()), seed, cache_gb))
        except Exception as error:  # whatever vLLM's configuration, its workers and their libraries raise
            raise ConfigError(f"{folder}: vLLM does not start ({error}); mend it in engine.options") from error
        self._dtype = dtype
        self.lm = VllmScorer(self._llm, vllm.SamplingParams, vocabulary, longest, seed)

    def swap(self, recipe: Recipe, with_digest: bool = False) -> Mapping[str, Any]:
        """Merge the recipe into the running model. Raises CandidateError when it cannot be, and MachineError when
        memory or a file is lost; the next swap mends that.

        Returns the `seconds` it took in the worker, how many `tensors` were merged and, if asked for, their `digest`.
        """
        outcomes = self._llm.collective_rpc("swap_recipe", args=(recipe.as_dict(), with_digest))
        if not self._llm.reset_prefix_cache():  # what is in it was computed with the weights before
            raise RuntimeError("vLLM did not reset its prefix cache, so it would answer for two models at once")
        for outcome in outcomes:
            if outcome["error"] is not None:
                raise ERRORS.get(outcome["kind"], CandidateError)(outcome["error"])
        return outcomes[0]

    def differences(self, folder: Path) -> Sequence[str]:
        """The probe texts that the running model finds clearly more or less likely than transformers does.

        Transformers loads the exported model from `folder` on the CPU. Both round to the same type, but not in the
        same places: what they may differ by is bfloat16's noise (see `NOISE`).
        """
        reference = HfEngine(folder, folder, self._dtype, "cpu")
        requests = [Instance("loglikelihood", {}, probe, 0) for probe in PROBES]
        own, other = self.lm.loglikelihood(requests), reference.lm.loglikelihood(requests)
        reference.close()
        counts = [len(self.lm.tok_encode(rest)) for _, rest in PROBES]
        return [
            f"{' '.join(probe)!r} ({mine:.2f} in vLLM, {exported:.2f} in transformers)"
            for probe, (mine, _), (exported, _), count in zip(PROBES, own, other, counts, strict=True)
            if not abs(mine - exported) <= NOISE * count + 0.02 * abs(exported)
            and not (math.isnan(mine) and math.isnan(exported))  # the model's own
        ]

    def close(self) -> None:
        """End vLLM and free its memory; the engine and its `lm` cannot be used any more."""
        if self._llm is None:
            return
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = self.lm.llm = None
        if _in_process():
            gc.collect()
            importlib.import_module("vllm.distributed").cleanup_dist_env_and_memory()


def _import_vllm() -> Any:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("vllm")
    except ImportError as error:
        raise ConfigError(
            f"engine.backend: vLLM cannot be imported ({error}); on a machine with a GPU `pip install"
            " 'llmevo[vllm]'`, on one without `make vllm` in llmevo's folder, or take the backend hf"
        ) from error


def _on_cpu() -> bool:
    return importlib.import_module("vllm.platforms").current_platform.is_cpu()


def _in_process() -> bool:
    return os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0"


def _keywords(folder: Path, given: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """The longest text, and the keywords of `vllm.LLM`: the user's over defaults that suit scoring."""
    if taken := OURS & given.keys():
        raise ConfigError(f"engine.options: {', '.join(sorted(taken))} is set by llmevo; remove it")
    keywords: dict[str, Any] = {
        "worker_extension_cls": "llmevo.engines.vllm_worker.MergeWorker",
        "enable_prefix_caching": True,
        "use_tqdm_on_load": False,
    }
    if _on_cpu():
        keywords |= {"enforce_eager": True, "block_size": CPU_BLOCK, "kv_cache_memory_bytes": CPU_CACHE}
    config = load_pretrained(AutoConfig, folder).get_text_config()
    holds = getattr(config, "max_position_embeddings", None) or LONGEST
    longest = int(given.get("max_model_len") or min(LONGEST, holds))
    # vLLM wants room for one token after each text, though nothing is computed there when a text is only scored.
    return longest, {**keywords, **given, "max_model_len": longest + 1}


@contextmanager
def _starting(alone: bool) -> Generator[None]:
    """The surroundings vLLM starts in; `alone` if it needs one worker only."""
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
            stack.enter_context(_no_ffi())
        else:
            stack.enter_context(_no_main())
        stack.callback(setattr, sys, "excepthook", sys.excepthook)  # and torch.distributed this
        stack.callback(setattr, torch, "set_num_threads", torch.set_num_threads)  # vLLM replaces it on CPU
        yield


@contextmanager
def _no_main() -> Generator[None]:
    """Keep spawned processes from running the user's script again: they need nothing of it."""
    main: Any = sys.modules["__main__"]
    file, main.__spec__, spec = vars(main).pop("__file__", None), None, main.__spec__
    try:
        yield
    finally:
        main.__spec__ = spec
        if file is not None:
            main.__file__ = file


@contextmanager
def _no_ffi() -> Generator[None]:
    """Hide a module of numba's that vLLM 0.32 stumbles over when it looks through all modules for its kernels."""
    name = "llvmlite.binding.ffi"
    module = sys.modules.pop(name, None)
    try:
        yield
    finally:
        if module is not None:
            sys.modules[name] = module


@contextmanager
def _no_messages() -> Generator[None]:
    """Drop what libraries write to standard error, C++ ones too. Errors are raised."""
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
