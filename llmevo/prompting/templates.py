"""The prompt texts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from llmevo.errors import ConfigError


class Templates:
    """The prompt texts: the package's, or those of the same name in a folder of the user's, or as a run logged them."""

    def __init__(self, folder: Path | None = None, recorded: Mapping[str, str] | None = None) -> None:
        here = Path(__file__).parents[1]
        own = here / "prompts" if (here / "prompts").is_dir() else here.parent / "prompts"
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"llm.prompts: there is no folder {folder}")
        self.folders = [folder, own] if folder else [own]
        self._environment = jinja2.Environment(
            loader=jinja2.ChoiceLoader([jinja2.DictLoader(recorded or {}), jinja2.FileSystemLoader(self.folders)]),
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=False,
            autoescape=False,
        )

    def render(self, name: str, **variables: Any) -> str:
        """One template, filled. Raises ConfigError for a missing or unknown variable, naming file and variable."""
        try:
            return self._environment.get_template(name).render(**variables)
        except jinja2.UndefinedError as error:
            raise ConfigError(f"prompts/{name}: {error.message}; it may use {', '.join(sorted(variables))}") from error
        except jinja2.TemplateError as error:
            raise ConfigError(f"prompts/{name}: {error}") from error

    def texts(self, names: Sequence[str]) -> dict[str, str]:
        """The files as they are, for the log."""
        loader = self._environment.loader
        assert loader is not None
        return {name: loader.get_source(self._environment, name)[0] for name in names}
