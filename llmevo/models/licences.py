"""Licences of models, by the names that the Hugging Face hub has for them. Nothing here is legal advice."""

from collections.abc import Iterable

META = "Meta's community licence: 'Built with Llama' is shown, the name begins with 'Llama'"
RAIL = "a RAIL licence: its use restrictions are passed on with the result"

DUTIES = {
    "llama2": "Meta's community licence: its text and notice go along, its use policy holds",
    "llama3": "Meta's community licence: 'Built with Meta Llama 3' is shown, the name begins with 'Llama 3'",
    **dict.fromkeys(("llama3.1", "llama3.2", "llama3.3", "llama4"), META),
    "gemma": "Google's terms: they and their use restrictions are passed on with the result",
    **dict.fromkeys(("bigscience-bloom-rail-1.0", "openrail", "creativeml-openrail-m", "bigcode-openrail-m"), RAIL),
}
"""Licences of model makers with duties for derived models."""

FREE = ("cc-by-4.0", "apache-2.0", "bsd-3-clause", "bsd", "bsd-2-clause", "mit", "isc", "unlicense", "cc0-1.0")
"""Licences that require a notice at most, the strictest first."""

UNKNOWN = ("other", "unknown")


AND = " and "
"""Between the licences of an adapter and of the model under it."""


def both(adapter: str, model: str | None) -> str:
    """Return the licences of an adapter and of the model under it as one text, which `parts` takes apart."""
    return AND.join(dict.fromkeys([normal(adapter), normal(model) or "unknown"]))


def parts(licence: str | None) -> list[str]:
    """Return the licences that a text names, as they are listed here; one that is empty where there is none."""
    return [normal(part) for part in (licence or "").split(AND)]


def normal(licence: str | None) -> str:
    """Return a licence as it is listed here; empty without one."""
    return (licence or "").strip("\"'").lower()


def strictest(licences: Iterable[tuple[str, str | None]]) -> tuple[str | None, str]:
    """Return the licence of a model made of others, and a sentence where none can be given.

    `licences` are (model, licence). It is the one licence with duties among free ones, or the strictest free one. It is
    None where a model's licence is unknown or allows no derived works, and where two ask for different things.
    """
    found: dict[str, str] = {}
    for model, licence in licences:
        for part in parts(licence):
            found.setdefault(part, model)
    if unknown := next((found[name] for name in ("", *UNKNOWN) if name in found), ""):
        return None, f"No licence is given, as that of {unknown} is not known: check it before you share the model."
    if forbidding := next((name for name in found if "-nd" in name), ""):
        return None, f"No licence is given: {found[forbidding]} is under {forbidding}, which allows no derived works."
    demanding = [name for name in found if name not in FREE]
    if len(demanding) > 1:
        named = ", ".join(f"{found[name]} is under {name}" for name in demanding)
        return None, f"No licence is given, as the models' ask for different things ({named})."
    return next(iter(demanding), next((name for name in FREE if name in found), None)), ""
