"""The notebooks as pages of the site: their texts, cells and printed outputs."""

import json
from pathlib import Path
from typing import Any

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
WRITES = "%%writefile "


def cells_of(notebook: Path) -> list[tuple[str, str, str]]:
    """(kind, text, printed output) of each cell; the kind is `markdown` or `code`."""
    cells: list[dict[str, Any]] = json.loads(notebook.read_text())["cells"]
    return [(cell["cell_type"], _joined(cell["source"]), _printed(cell.get("outputs", []))) for cell in cells]


def _joined(lines: str | list[str]) -> str:
    return lines if isinstance(lines, str) else "".join(lines)


def _printed(outputs: list[dict[str, Any]]) -> str:
    return "".join(_joined(one.get("text", "")) for one in outputs)


def notebook_page(notebook: Path) -> str:
    """The page of a notebook. Cells of shell commands and of a file that is written are shown as such."""
    parts: list[str] = []
    for kind, text, printed in cells_of(notebook):
        if kind == "markdown":
            parts.append(text)
        elif text.startswith(WRITES):
            name, _, content = text.removeprefix(WRITES).partition("\n")
            parts.append(f"`{name}`:\n\n```yaml\n{content}\n```")
        elif all(line.startswith("!") for line in text.splitlines()):
            commands = "\n".join(line.removeprefix("!") for line in text.splitlines())
            parts.append(f"```sh\n{commands}\n```")
        else:
            parts.append(f"```python\n{text}\n```")
        if printed:
            parts.append(f"```text\n{printed.rstrip()}\n```")
    title, _, rest = parts[0].partition("\n")
    parts[0] = (
        f"{title}\n\n[Download this notebook]({notebook.name}), or open it in `docs/notebooks` of a clone.\n{rest}"
    )
    return "\n\n".join(parts) + "\n"
