"""An inspection as text: sections with headings, the most important first, 80 characters wide."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from llmevo.errors import plural
from llmevo.reports.text import clock, say
from llmevo.run.preflight.forecast import EXPECTED, GB
from llmevo.run.preflight.inspection import Inspection
from llmevo.run.preflight.models import most_alike

COLD, WARM = (26, 32, 64), (214, 92, 40)
"""The ends of the colour scale, as red, green and blue."""
COLUMNS = 9
"""As many fit into 80 characters."""
FEW = 24
"""Genes that are listed one by one."""
FEWEST = 2
"""Tensors that are named of those that are not merged for one reason."""


def heatmap(rows: Sequence[str], columns: Mapping[str, Sequence[float]], percent: bool = False) -> Table:
    """Return one row a name, one column a list of values; the largest is the warmest, 0 and less the coldest."""
    top = max((value for values in columns.values() for value in values), default=0.0) or 1.0
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("", *columns):
        table.add_column(name, justify="left" if not name else "right")
    for place, row in enumerate(rows):
        table.add_row(row, *(cell(values[place], top, percent) for values in columns.values()))
    return table


def cell(value: float, top: float, percent: bool = False) -> Text:
    """Return one value on its colour."""
    share = min(1.0, max(0.0, value / top))
    red, green, blue = (round(cold + (warm - cold) * share) for cold, warm in zip(COLD, WARM, strict=True))
    text = f"{value:.1%}" if percent else f"{value:.2f}"
    return Text(f" {text} ", style=f"white on rgb({red},{green},{blue})")


def show(found: Inspection, console: Console) -> None:
    """Print an inspection."""
    for title, section in SECTIONS.items():
        console.print(f"\n{title.format(found=found)}", style="bold", highlight=False)
        for part in section(found):
            console.print(Padding(part, (0, 0, 0, 2), expand=False), highlight=False)
    if found.prompt:
        console.print(f"\nFirst prompt, for {found.proposer} (scores are not known yet: 0)", style="bold")
        for message in found.prompt:
            say(console, f"[{message['role']}]", "bold")
            say(console, message["content"])


def _forecast(found: Inspection) -> Sequence[RenderableType]:
    ahead, measured = found.forecast, found.forecast.measured
    lines = [
        f"{plural(ahead.evaluations, 'evaluation')} of {plural(ahead.items, 'question')}"
        f" ({plural(ahead.tokens, 'token')}) each,"
        f" {ahead.start_rows} of them start rows, then {plural(ahead.generations, 'generation')} of {ahead.population};"
        f" {plural(ahead.all_items, 'question')} in all, the held-out ones included. Budget: {found.budget}."
    ]
    error = (
        ""
        if ahead.heldout_error is None
        else f"; ± {ahead.heldout_error:.2f} on the held-out score at an accuracy of {EXPECTED:g}"
    )
    lines.append(
        f"{ahead.items:,} search, {ahead.selection_items:,} selection, {ahead.heldout_items:,} held-out"
        f" questions{error}."
    )
    several = f" with {ahead.workers} workers" if ahead.workers > 1 else ""
    if measured:
        lines.append(
            f"About {clock(ahead.seconds)}{several}, by one candidate that was merged in {measured.merge:.2f} s and"
            f" scored in {measured.evaluate:.2f} s ({measured.items_per_second:.1f} questions a second)."
        )
    else:
        lines.append(
            f"About {clock(ahead.seconds)}{several or ' on this machine'}: an estimate; --measure scores one candidate."
        )
    if ahead.prompts:
        cost = "unknown without llm.price" if ahead.cost is None else f"{ahead.cost:.2f} at the config's prices"
        cost = cost if ahead.by_server or ahead.cost else "none: it runs on this machine"
        asked, read = plural(ahead.prompts, "time"), plural(ahead.prompt_tokens, "token")
        lines.append(
            f"The LLM is asked up to {asked}, reads about {read} and writes about {ahead.completion_tokens:,};"
            f" cost {cost}. Its time is not in the above."
        )
    if ahead.inquiries:
        lines.append(f"LLM judges are asked up to {plural(ahead.inquiries, 'time')}; their cost is not in the above.")
    if ahead.votes:
        lines.append(f"You are asked for up to {plural(ahead.votes, 'vote')}; your time is not in the above.")
    of = found.memory
    free = "unknown" if of.free is None else f"{of.free / GB:.1f} GB"
    lines.append(
        f"Memory: engine {of.engine / GB:.2f} GB ({of.device}), caches up to {of.caches / GB:.2f} GB, mapped files"
        f" {of.weights / GB:.2f} GB; free: {free}."
    )
    return lines


def _warnings(found: Inspection) -> Sequence[RenderableType]:
    if not found.warnings:
        return ["none"]
    return [Text.assemble(("!", "yellow"), " ", (w.model, "bold"), f": {w.what}. {w.remedy}.") for w in found.warnings]


def _uses(found: Inspection) -> Sequence[RenderableType]:
    if not found.uses:
        return ["No code of the config's runs, and nothing is sent anywhere."]
    return [Text(str(use)) for use in found.uses]


def _models(found: Inspection) -> Sequence[RenderableType]:
    table = Table(box=None, pad_edge=False)
    for column in ("model", "parameters", "stored in", "licence"):
        table.add_column(column, justify="right" if column == "parameters" else "left", overflow="fold")
    for model in found.models:
        table.add_row(model.name, f"{model.parameters:,}", model.dtype, model.licence or "none named")
    return [
        table,
        f"The merge is written in {found.dtype}. Rounding to it loses {found.rounding_loss:.0%} of what the uniform"
        " merge changes.",
        *_tensors(found),
    ]


def _tensors(found: Inspection) -> Sequence[str]:
    """The numbers of tensors, and some of those that are not merged for each reason."""
    unmerged = found.tensors.unmerged
    numbers = ", ".join(f"{sum(map(len, of.values()))} {how}" for how, of in unmerged.items())
    lines = [f"Tensors of a candidate: {found.tensors.merged} merged, {numbers}."]
    for how, reasons in unmerged.items():
        for reason, names in reasons.items():
            more = ", …" if len(names) > FEWEST else ""
            lines.append(f"{len(names)} {how}, {reason}: {', '.join(names[:FEWEST])}{more}.")
    if found.routers:
        lines.append(found.routers)
    return lines


def _vectors(found: Inspection) -> Sequence[RenderableType]:
    facts = found.geometry
    letters = {name: chr(97 + n) if n < 26 else str(n) for n, name in enumerate(facts[0].norms)}
    rows = [of.slice for of in facts]
    sizes = {letter: [of.norms[model] for of in facts] for model, letter in letters.items()}
    pairs = most_alike(facts)[:COLUMNS]
    cosines = {
        "/".join(letters[name] for name in pair.split("/")): [of.cosines[pair] for of in facts] for pair in pairs
    }
    parts: list[RenderableType] = [", ".join(f"{letter} {model}" for model, letter in letters.items())]
    each = [*sizes]
    for start in range(0, len(each), COLUMNS):
        parts.append(heatmap(rows, {name: sizes[name] for name in each[start : start + COLUMNS]}, percent=True))
    if cosines:
        more = "" if len(pairs) == len(facts[0].cosines) else f" (the {len(pairs)} most alike pairs)"
        parts += [f"Cosines between them{more}:", heatmap(rows, cosines)]
        if found.model_stock:
            ratios = " ".join(f"{ratio:.2f}" for ratio in found.model_stock)
            parts.append(
                f"Model Stock would give the models' mean this weight, by layer; the base has the rest: {ratios}."
            )
    return parts


def _genes(found: Inspection) -> Sequence[RenderableType]:
    table = Table(box=None, pad_edge=False)
    many = len(found.genes) > FEW
    for column in ("gene", *(["slices and filters"] if many else []), "low", "high", "uniform"):
        table.add_column(column, justify="left" if column == "gene" else "right", overflow="fold")
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for gene in found.genes:
        parts = str(gene["name"]).split("/")
        place = (f"{parts[0]}/…/{parts[-1]}",) if many and len(parts) > 2 else (gene["name"],)
        groups.setdefault((*place, *_bounds(gene)), []).append(gene)
    for (name, *bounds), genes in groups.items():
        table.add_row(name, *([str(len(genes))] if many else []), *bounds)
    return [table]


def _bounds(gene: Mapping[str, Any]) -> tuple[str, str, str]:
    if gene.get("choices"):
        return ", ".join(gene["choices"]), "", gene["uniform"]
    return f"{gene['low']:g}", f"{gene['high']:g}", gene["uniform"]


SECTIONS: Mapping[str, Callable[[Inspection], Sequence[RenderableType]]] = {
    "Forecast": _forecast,
    "Warnings": _warnings,
    "What this config runs, opens and sends": _uses,
    "Models": _models,
    "Size of the task vectors, against {found.origin}": _vectors,
    "{found.extent}": _genes,
}
"""In the order shown; all but the last two fit on one screen."""
