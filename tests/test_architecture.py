"""The import order of the design holds, and importing does nothing."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import llmevo

PACKAGE = Path(llmevo.__file__).parent
FLOORS = (
    {"errors"},
    {"models", "llm"},
    {"merging", "evaluation"},
    {"search", "engines"},
    {"config", "workers"},
    {"run"},
    {"export", "reports"},
    {"cli", "testing"},
)
"""The rooms by floor, the lowest first. A room imports only from lower floors: rooms of one floor do not know each
other. `CONTRIBUTING.md` has the same table.
"""
MOST_ENTRIES = 15
MOST_ARROWS = 60

FILES = {
    ".".join(("llmevo", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): file
    for file in sorted(PACKAGE.rglob("*.py"))
}


def room_of(module: str) -> str:
    """`llmevo.merging.methods.ties` is of the room `merging`."""
    return module.split(".")[1] if "." in module else ""


def imports_of(file: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in FILES}
        elif isinstance(node, ast.ImportFrom) and node.module in FILES:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & FILES.keys()) or {node.module}
    return found


IMPORTS = {module: imports_of(file) for module, file in FILES.items() if module != "llmevo"}


def test_a_room_imports_only_from_lower_floors() -> None:
    floor = {room: place for place, rooms in enumerate(FLOORS) for room in rooms}
    wrong = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others
        if room_of(module) != room_of(other) and floor[room_of(other)] >= floor[room_of(module)]
    ]
    assert not wrong


def test_no_room_imports_the_package_itself() -> None:
    """`llmevo/__init__.py` exports the Python API, which may come from any room."""
    assert not [module for module, others in IMPORTS.items() if "llmevo" in others]


def test_no_files_import_each_other_in_a_circle() -> None:
    left = {module: {*others} - {module} for module, others in IMPORTS.items()}
    while free := [module for module, others in left.items() if not others & left.keys()]:
        for module in free:
            del left[module]
    assert not left


def test_there_are_few_rooms_and_few_arrows_between_them() -> None:
    entries = {file.name for file in PACKAGE.iterdir() if file.name != "__pycache__"}
    assert len(entries) <= MOST_ENTRIES, entries
    arrows = {(room_of(module), room_of(other)) for module, others in IMPORTS.items() for other in others}
    assert len({arrow for arrow in arrows if arrow[0] != arrow[1]}) <= MOST_ARROWS


def test_the_table_of_rooms_is_the_one_in_the_guide_for_contributors() -> None:
    guide = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| (\d) \| ([^|]+) \|", guide, re.MULTILINE)
    table = [(int(floor), {*re.findall(r"`(\w+)", rooms)}) for floor, rooms in rows]
    assert table == [(place + 1, rooms) for place, rooms in enumerate(FLOORS)]


def test_importing_prints_nothing_and_opens_no_model() -> None:
    code = "import sys, llmevo, llmevo.merging.methods, llmevo.search.genome; assert 'vllm' not in sys.modules"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
