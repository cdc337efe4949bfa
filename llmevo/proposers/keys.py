"""Where the API key of a server stands that is given no key outright."""

import os
from pathlib import Path

from llmevo.errors import UserError


def read_key(file: Path | str | None, root: Path, place: str) -> str | None:
    """The key in a file, or of the environment where there is no file; None where neither has one.

    Relative paths start at `root`. Raises UserError, with the key of the config at `place`, for a file that cannot be
    read.
    """
    if file is None:
        return os.environ.get("OPENAI_API_KEY") or None
    try:
        return (root / Path(file).expanduser()).read_text().strip()
    except OSError as error:
        raise UserError(f"{place}: {file} cannot be read ({error.strerror})") from error
