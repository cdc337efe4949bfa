"""Numbers in coloured cells, for a terminal: where they are high is seen before they are read."""

from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

Colour = tuple[int, int, int]
COLD: Colour = (26, 32, 64)
WARM: Colour = (214, 92, 40)
COLUMNS = 9
"""As many fit into 80 characters."""


def heatmap(rows: Sequence[str], columns: Mapping[str, Sequence[float]], percent: bool = False) -> Table:
    """One row a name, one column a list of values; the largest of all is the warmest, 0 and less the coldest."""
    top = max((value for values in columns.values() for value in values), default=0.0) or 1.0
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("", *columns):
        table.add_column(name, justify="left" if not name else "right")
    for place, row in enumerate(rows):
        cells = [cell(values[place], top, percent) for values in columns.values()]
        table.add_row(row, *cells)
    return table


def cell(value: float, top: float, percent: bool = False) -> Text:
    """One value on its colour."""
    share = min(1.0, max(0.0, value / top))
    red, green, blue = (round(cold + (warm - cold) * share) for cold, warm in zip(COLD, WARM, strict=True))
    text = f"{value:.1%}" if percent else f"{value:.2f}"
    return Text(f" {text} ", style=f"white on rgb({red},{green},{blue})")


def letters(names: Sequence[str]) -> dict[str, str]:
    """A short name for each: a, b, ..., z, then numbers."""
    return {name: chr(97 + place) if place < 26 else str(place) for place, name in enumerate(names)}
