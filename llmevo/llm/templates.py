"""The prompt texts."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmevo.errors import ConfigError

EARLIER = {"chat_user.j2": ("e102a20740498ab709bc8260122e5b75",)}
"""The templates of earlier versions that are others today: the first 32 digits of their SHA-256. Logs hold them."""

PLAIN = (str, int, float, bool, list, tuple, dict, set, frozenset)
"""The types whose methods a template may call."""

JINJA = ("jinja2.runtime", "jinja2.utils")
"""Where macros, loops, cyclers and namespaces come from."""


class Sandbox(ImmutableSandboxedEnvironment):
    """Fills templates that others may have written. They read what they are given and call the methods of plain values,
    macros and Jinja's own functions.

    Jinja's sandbox alone lets a template call every public method of the objects that it is given; among them are
    pydantic's `parse_raw`, which unpickles, and NumPy's `tofile`. A range has `MAX_RANGE` numbers at most. The time and
    memory that nested loops and long texts take are not limited.
    """

    def is_safe_callable(self, obj: Any) -> bool:
        method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps str.format, to look at what that reads
        kinds = type(obj), type(getattr(method, "__self__", None))
        known = any(kind.__module__ in JINJA for kind in kinds) or any(obj is each for each in self.globals.values())
        return super().is_safe_callable(obj) and (known or kinds[1] in PLAIN)


class Templates:
    """The prompt texts: the package's, or those of the same name in a folder of the user's, or as a run logged them."""

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
        """One template, filled. Raises ConfigError, with the file and the reason, for one that cannot be filled."""
        try:
            return self._environment.get_template(name).render(**variables)
        except jinja2.UndefinedError as error:
            raise ConfigError(f"prompts/{name}: {error.message}; it may use {', '.join(sorted(variables))}") from error
        except jinja2.TemplateError as error:
            raise ConfigError(f"prompts/{name}: {error}") from error
        except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise ConfigError(f"prompts/{name}: {type(error).__name__}: {error}") from error

    def texts(self, names: Sequence[str]) -> dict[str, str]:
        """The files as they are, for the log."""
        loader = self._environment.loader
        assert loader is not None
        return {name: loader.get_source(self._environment, name)[0] for name in names}


def foreign(prompts: Mapping[str, str], folder: Path | None = None) -> list[str]:
    """The names of a log's templates that are not llmevo's, of this version or an earlier one, nor those of `folder`,
    the user's own. What is logged of a judge is not counted: it is shown and never filled.
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
