"""What is wrong with a config, in words."""

from typing import Any

from pydantic import BaseModel

from llmevo.errors import nearest, shortened
from llmevo.peers import key_hint


def explained(detail: Any, root: type[BaseModel]) -> str:
    """One of pydantic's errors about a `root`: the path of the key, what is wrong, and the nearest known key."""
    place = ".".join(str(part) for part in detail["loc"])
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        model: type[BaseModel] | None = root
        for part in detail["loc"][:-1]:
            model = _section(model, str(part)) if model else None
        known = [*model.model_fields] if model else []
        key = str(detail["loc"][-1])
        return f"{place}: there is no such key{key_hint(key) or _elsewhere(key, place, root) or nearest(key, known)}"
    if detail["type"] == "missing":
        return f"{place}: this key is missing"
    if not place:
        return shortened(message)  # of several sections together; it names them
    given = "" if isinstance(detail["input"], dict) else f" (it is {shortened(repr(detail['input']), 200)})"
    return f"{place}: {shortened(message)}{given}"


def _elsewhere(key: str, place: str, root: type[BaseModel]) -> str:
    """Where a key belongs that stands in a wrong section: at the top, or in a section of the config."""
    if key in root.model_fields and "." in place:
        return f"; {key!r} belongs at the top of the file, not under {place.rpartition('.')[0]!r}"
    sections = {name: _section(root, name) for name in root.model_fields}
    homes = [name for name, section in sections.items() if section and key in section.model_fields]
    return f"; use {homes[0]}.{key}" if len(homes) == 1 and not place.startswith(f"{homes[0]}.") else ""


def _section(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The model behind a key, through lists."""
    if key.isdigit():
        return model
    field = model.model_fields.get(key)
    kinds: list[Any] = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
