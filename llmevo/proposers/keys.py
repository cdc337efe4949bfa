"""Which API key goes to which server."""

import os
from pathlib import Path
from urllib.parse import urlsplit

from llmevo.errors import UserError

VARIABLE = "OPENAI_API_KEY"
"""The environment variable with the key for OpenAI's server, or for that of `ADDRESS`."""
ADDRESS = "OPENAI_BASE_URL"
"""The environment variable that names the server that `VARIABLE` is for. The openai client reads it too."""
DEFAULT = "https://api.openai.com/v1"


def is_own_server(base_url: str | None) -> bool:
    """Whether a server is the one that the environment's key is for: same scheme, host and port."""
    return base_url is None or _origin(base_url) == _origin(os.environ.get(ADDRESS) or DEFAULT)


def read_key(
    file: Path | str | None, root: Path, place: str, variable: str | None = None, base_url: str | None = None
) -> str | None:
    """The key in a file, or in the environment variable that the config names; where it names neither, OPENAI_API_KEY,
    if that is for this server. None where there is none.

    Relative paths start at `root`. Raises UserError, with the section of the config at `place`, for a file that cannot
    be read, a variable that is not set, and OPENAI_API_KEY for another server.
    """
    if file is not None:
        try:
            return (root / Path(file).expanduser()).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise UserError(f"{place}.api_key_file: {file} cannot be read ({reason})") from error
    if variable == VARIABLE and not is_own_server(base_url):
        raise UserError(
            f"{place}.api_key_env: {VARIABLE} is for its own server only; keep the key of"
            f" {without_password(base_url or DEFAULT)} in a variable of another name"
        )
    if variable is not None:
        if key := os.environ.get(variable):
            return key
        raise UserError(f"{place}.api_key_env: the environment variable {variable} is not set; set it to the key")
    return os.environ.get(VARIABLE) or None if is_own_server(base_url) else None


def withheld(key: str | None, base_url: str | None) -> str:
    """What to say of a server that was sent no key although the environment has one; empty otherwise."""
    if key or is_own_server(base_url) or not os.environ.get(VARIABLE):
        return ""
    return f"{VARIABLE} was not sent, as it is for {without_password(os.environ.get(ADDRESS) or DEFAULT)}"


def without_password(address: str) -> str:
    """An address without the user and password in it."""
    scheme, separator, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"


def _origin(address: str) -> tuple[str, str | None, int | None] | str:
    try:
        parts = urlsplit(address)
        return parts.scheme, parts.hostname, parts.port or {"https": 443, "http": 80}.get(parts.scheme)
    except ValueError:  # no address: equal to itself only
        return address
