"""What is wrong with a config, in words."""

from typing import Any

from pydantic import BaseModel

from llmevo.errors import nearest, shortened


def explained(detail: Any, root: type[BaseModel]) -> str:
    """One of pydantic's errors about a `root`: the path of the key, what is wrong, and the nearest known key."""
    place = ".".join(str(part) for part in detail["loc"])
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        model: type[BaseModel] | None = root
        for part in detail["loc"][:-1]:
            model = _section(model, str(part)) if model else None
        known = [*model.model_fields] if model else []
        return f"{place}: there is no such key{nearest(str(detail['loc'][-1]), known)}"
    if detail["type"] == "missing":
        return f"{place}: this key is missing"
    if not place:
        return shortened(message)  # of several sections together; it names them
    given = "" if isinstance(detail["input"], dict) else f" (it is {shortened(repr(detail['input']), 200)})"
    return f"{place}: {shortened(message)}{given}"


def _section(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The model behind a key, through lists."""
    if key.isdigit():
        return model
    field = model.model_fields.get(key)
    kinds: list[Any] = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
