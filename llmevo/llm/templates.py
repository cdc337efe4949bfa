"""The prompt texts."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmevo.errors import ConfigError

EARLIER = {
    "chat_short.j2": (
        "c5225d2de019004664756d1bacd53ca7",
        "3715cb46c6b5bd24f8d51bcf6b14f853",
        "a0593316a328342f4141d090def2c8b3",
        "7237b25895b7a6fa9b5ee358b3824024",
    ),
    "chat_system.j2": (
        "2ac7551153e3e6734afcffe605c0200e",
        "862cc0e8404de539e33fe0f787e26113",
        "108e0883ed83307d12d0199cf1fdca34",
        "2883cf477d5c7848e02b96fc78350ba0",
        "96b591e5f9b40401aa707865a7faf76d",
        "0abf31385b6d15ffac3c6cadb93b22a1",
    ),
    "chat_user.j2": (
        "e102a20740498ab709bc8260122e5b75",
        "428bb77a3f5ea8355483380c1f94332b",
        "548bbfba65c077b4c73548897dfee3b5",
        "a8c938f4ee7a2267b6dc4f29619234f9",
        "d19928f9972a8e1c5966c8f0f6b7b67e",
        "4790ddb7e2e7b38c0fd6a142904019ce",
        "c11d79eb171e3e773b5cbcde2d817c87",
    ),
    "paths_system.j2": ("905cc58ad6a3a5519fda8050a53cbd40",),
    "paths_user.j2": (
        "e0c64798ea6c6e4065ee7c08cc66fa29",
        "3706472f617b087ab9ad2d6073739fed",
        "09eb09f145f2959734b44d3f572f0122",
    ),
}
"""The first 32 digits of the SHA-256 of earlier versions' templates, which logs hold."""

PLAIN = (str, int, float, bool, list, tuple, dict, set, frozenset)
"""The types whose methods a template may call."""

JINJA = ("jinja2.runtime", "jinja2.utils")
"""The modules of macros, loops, cyclers and namespaces."""


class Sandbox(ImmutableSandboxedEnvironment):
    """Fills untrusted templates, which may call the methods of plain values, macros and Jinja's own functions only.

    Jinja's sandbox alone lets a template call every public method of its variables, such as pydantic's `parse_raw`,
    which unpickles, and NumPy's `tofile`. A range has `MAX_RANGE` numbers at most; time and memory are not limited.
    """

    def is_safe_callable(self, obj: Any) -> bool:
        method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps str.format
        kinds = type(obj), type(getattr(method, "__self__", None))
        known = any(kind.__module__ in JINJA for kind in kinds) or any(obj is each for each in self.globals.values())
        return super().is_safe_callable(obj) and (known or kinds[1] in PLAIN)


class Templates:
    """The prompt texts: those that a run logged, those in a folder of the user's, or the package's."""

    def __init__(self, folder: Path | None = None, recorded: Mapping[str, str] | None = None) -> None:
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"llm.prompts: there is no folder {folder}")
        own = _own_folder()
        self.folders = [folder, own] if folder else [own]
        self._environment = Sandbox(
            loader=jinja2.ChoiceLoader([jinja2.DictLoader(recorded or {}), jinja2.FileSystemLoader(self.folders)]),
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=False,
            autoescape=False,
        )

    def render(self, name: str, **variables: Any) -> str:
        """Fill one template. Raises ConfigError, with the file and the reason."""
        try:
            return self._environment.get_template(name).render(**variables)
        except jinja2.UndefinedError as error:
            raise ConfigError(f"prompts/{name}: {error.message}; it may use {', '.join(sorted(variables))}") from error
        except jinja2.TemplateError as error:
            raise ConfigError(f"prompts/{name}: {error}") from error
        except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise ConfigError(f"prompts/{name}: {type(error).__name__}: {error}") from error

    def texts(self, names: Sequence[str]) -> dict[str, str]:
        """Return the files' texts, for the log."""
        loader = self._environment.loader
        assert loader is not None
        return {name: loader.get_source(self._environment, name)[0] for name in names}


def foreign(prompts: Mapping[str, str], folder: Path | None = None) -> list[str]:
    """Return the names of a log's templates that are not llmevo's, of any version, nor in `folder`, the user's own.

    A judge's texts (with `/` in the name) are shown and never filled, so they are not checked.
    """
    folders = [_own_folder(), *([folder] if folder else [])]
    return [
        name
        for name, text in prompts.items()
        if "/" not in name
        and hashlib.sha256(text.encode(errors="replace")).hexdigest()[:32] not in EARLIER.get(name, ())
        and not any(_reads(place / name, text) for place in folders)
    ]


def _reads(file: Path, text: str) -> bool:
    try:
        return file.read_text(encoding="utf-8") == text
    except (OSError, ValueError):  # also a name that no file can have
        return False


def _own_folder() -> Path:
    here = Path(__file__).parents[1]
    return here / "prompts" if (here / "prompts").is_dir() else here.parent / "prompts"
