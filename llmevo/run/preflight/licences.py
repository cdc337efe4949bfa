"""Licences that may not go together, by what the model cards declare. It says what to check; it is no legal advice."""

from llmevo.run.preflight.base import Finding, Findings, names
from llmevo.run.scorer import Scorer

DUTIES = {
    "llama2": "Meta's community licence: its text and notice go along, its use policy holds",
    "llama3": "Meta's community licence: 'Built with Meta Llama 3' is shown, the name begins with 'Llama 3'",
    "llama3.1": "Meta's community licence: 'Built with Llama' is shown, the name begins with 'Llama'",
    "llama3.2": "Meta's community licence: 'Built with Llama' is shown, the name begins with 'Llama'",
    "llama3.3": "Meta's community licence: 'Built with Llama' is shown, the name begins with 'Llama'",
    "llama4": "Meta's community licence: 'Built with Llama' is shown, the name begins with 'Llama'",
    "gemma": "Google's terms: they and their use restrictions are passed on with the result",
    "bigscience-bloom-rail-1.0": "a RAIL licence: its use restrictions are passed on with the result",
    "openrail": "a RAIL licence: its use restrictions are passed on with the result",
    "creativeml-openrail-m": "a RAIL licence: its use restrictions are passed on with the result",
    "bigcode-openrail-m": "a RAIL licence: its use restrictions are passed on with the result",
}
"""Licences of model makers that ask something of what is derived."""


FREE = ("apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "isc", "cc0-1.0", "unlicense", "cc-by-4.0")
"""They ask for a notice at most."""


UNKNOWN = ("other", "unknown")


def licences(scorer: Scorer) -> Findings:
    """What several licences ask together; and models whose card names none."""
    declared: dict[str, list[str]] = {}
    for reference, name in names(scorer).items():
        licence = (scorer.sources.licence(reference) or "none").strip("\"'").lower()
        declared.setdefault(licence, []).append(name)
    for licence, models in declared.items():
        if said := _said(licence, [other for other in declared if other != licence]):
            yield Finding(", ".join(models), *said)


def _said(licence: str, others: list[str]) -> tuple[str, str] | None:
    """What is to be said of one licence beside the others: what it is, and what to check."""
    rest = ", ".join(others)
    known = [other for other in others if other not in ("none", *UNKNOWN)]
    if licence == "none":
        return "no card names a licence", "Check where they come from before you share the result"
    if licence in UNKNOWN:
        return f"its card says {licence!r}", "Check the text of its licence before you share the result"
    if "-nd" in licence:
        return f"{licence} allows no derived works, and a merge may be one", "Check before you share the result"
    if "-nc" in licence:
        beside = f", beside {rest}" if others else ""
        return f"{licence} forbids commercial use{beside}", "Check: the result is not for commercial use either"
    if "gpl" in licence or "-sa" in licence:
        clash = [other for other in known if other not in FREE]
        if clash:
            return (
                f"{licence} wants the result under itself alone, and {', '.join(clash)} asks for more",
                "Check whether both can be kept",
            )
        return (f"{licence} wants the result under itself", "Check that the others allow it") if known else None
    if licence in DUTIES and others:
        return DUTIES[licence], f"Check: this holds for the result, beside {rest}"
    return None
