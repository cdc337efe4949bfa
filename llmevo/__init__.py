"""llmevo: evolve the merge of your fine-tuned language models, with a language model in the loop.

The names of `__all__` are the Python API. Each is imported when it is first used: `import llmevo` loads no library.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmevo.config import Config
    from llmevo.errors import LlmevoError
    from llmevo.export.extract import extract
    from llmevo.export.merge import merge
    from llmevo.export.runs import Run, evolve, open_run
    from llmevo.merging.recipe import Recipe
    from llmevo.search.ask_tell import Search

__version__ = "0.1.0"

__all__ = ["Config", "LlmevoError", "Recipe", "Run", "Search", "__version__", "evolve", "extract", "merge", "open_run"]

_MODULES = {
    "Config": "config",
    "LlmevoError": "errors",
    "Recipe": "merging.recipe",
    "Run": "export.runs",
    "Search": "search.ask_tell",
    "evolve": "export.runs",
    "extract": "export.extract",
    "merge": "export.merge",
    "open_run": "export.runs",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'llmevo' has no attribute {name!r}")
    return getattr(import_module(f"llmevo.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
