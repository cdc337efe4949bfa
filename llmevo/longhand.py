"""mergekit's longer ways of saying the same, in the short ones that `Recipe` has."""

from typing import Any, cast

from llmevo.errors import nearest


def without_modules(given: dict[str, Any]) -> dict[str, Any]:
    """A recipe whose one module is the whole model, without `modules`."""
    modules = given.get("modules")
    if modules is None:
        return {key: value for key, value in given.items() if key != "modules"}
    if given.get("models") or given.get("slices"):
        raise ValueError("modules: give either `models`, `slices` or `modules`")
    if not isinstance(modules, dict) or [*modules] != ["default"] or not isinstance(modules["default"], dict):
        raise ValueError(
            "modules: llmevo merges language models, which have the one module `default`; write its `models` or"
            " `slices` at the top"
        )
    module = cast(dict[str, Any], modules["default"])
    known = ("models", "slices", "parameters")
    if unknown := [key for key in module if key not in known]:
        raise ValueError(f"modules.default: llmevo does not know the key {unknown[0]!r}{nearest(unknown[0], known)}")
    rest = {key: value for key, value in given.items() if key not in ("modules", "models", "slices", "parameters")}
    inner, outer = module.get("parameters") or {}, given.get("parameters") or {}
    if shared := [name for name in inner if name in outer]:
        raise ValueError(f"modules: {shared[0]!r} has a value for the module and one for the recipe; leave one")
    return {**rest, **module, "parameters": {**outer, **inner} or None}


def without_tokenizer(given: dict[str, Any]) -> dict[str, Any]:
    """A recipe whose `tokenizer` section says only where it comes from, as `tokenizer_source`."""
    section = given.get("tokenizer")
    rest = {key: value for key, value in given.items() if key != "tokenizer"}
    if section is None:
        return rest
    if given.get("tokenizer_source"):
        raise ValueError("tokenizer: give either `tokenizer` or `tokenizer_source`")
    known = ("source", "tokens", "pad_to_multiple_of")
    if not isinstance(section, dict):
        raise ValueError("tokenizer: give a `source`: `base`, or a model")
    for key, value in cast(dict[str, Any], section).items():
        if key not in known:
            raise ValueError(f"tokenizer: llmevo does not know the key {key!r}{nearest(str(key), known)}")
        if key != "source" and value:
            raise ValueError(
                f"tokenizer: {key} is not supported, as the models need one vocabulary; leave it out, or change the"
                " models with mergekit first"
            )
    return {**rest, "tokenizer_source": section.get("source") or "union"}
