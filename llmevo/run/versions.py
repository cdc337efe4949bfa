"""What a run is made with: what decides its scores, its candidates, and the last digits of both."""

import hashlib
import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path

from threadpoolctl import threadpool_info

VERSIONED = ("llmevo", "torch", "transformers", "lm-eval", "openai", "safetensors")
"""Decide scores and answers."""

NUMERIC = ("numpy", "scipy", "cma", "cmaes", "optuna", "scikit-learn")
"""Decide candidates, together with `search`, the digest of the code of the search."""


def versions() -> dict[str, str]:
    """Of Python, of the packages and files that decide scores and candidates, and of the processor's algebra."""
    libraries = [found for found in threadpool_info() if "numpy" in found["filepath"]]  # others load theirs later
    blas = ", ".join(f"{f['internal_api']} {f.get('version')} {f.get('architecture')}" for f in libraries)
    here = {"python": platform.python_version(), "machine": platform.machine(), "blas": blas, "search": _search_code()}
    return {**here, **{name: version(name) for name in (*VERSIONED, *NUMERIC)}}


@cache
def _search_code() -> str:
    """A digest of `llmevo/search`, which every candidate comes from. With other code a log need not follow from its
    config.
    """
    files = sorted((Path(__file__).parents[1] / "search").rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
