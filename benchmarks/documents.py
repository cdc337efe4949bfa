"""Keep the tables of the documentation equal to what their commands print.

    python benchmarks/documents.py            # write every table anew
    python benchmarks/documents.py --check    # exit status 1 and the differences where one is out of date

A table stands between two comments; the first one names the script in `benchmarks` that prints it and its arguments:

    <!-- from: tables.py benchmarks/results/merge.jsonl -->
    <!-- end -->

Where a results file that the command names is missing, nothing stands between them. In `README.md` and `docs`, a row
of a table with a measured number (a decimal fraction, a percentage, a power of ten, but not in code) that stands in no
such place is an error too: it would have no data.
"""

import argparse
import difflib
import re
import runpy
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import chdir, redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = "benchmarks/results"
BLOCK = re.compile(r"^(?P<head><!-- from: (?P<command>.+?) -->\n)(?P<body>.*?)(?P<end>^<!-- end -->)$", re.M | re.S)
MEASURED = re.compile(r"^\|.*(\d\.\d|\d ?%|\de-?\d).*$", re.M)
MADE = "<!-- Written by docs/tools/site_reference.py. -->"
"""The mark of a page that is made of the code, whose numbers are no measurements of this folder's commands."""
CODE = re.compile(r"`[^`\n]*`")


def documents() -> list[Path]:
    """Those that may hold tables from data."""
    pages = [file for file in sorted((ROOT / "docs").rglob("*.md")) if MADE not in file.read_text()]
    return [ROOT / "README.md", *pages, *sorted((ROOT / RESULTS).glob("*.md"))]


def commands(text: str) -> list[str]:
    return [block["command"] for block in BLOCK.finditer(text)]


@cache
def printed(command: str) -> str:
    """What a command prints, ending with a newline; nothing where a file that it names is missing."""
    script, *words = shlex.split(command)
    if not all((ROOT / word).exists() for word in words if word.startswith(RESULTS)):
        return ""
    # In this process: torch and transformers are imported once, not for every table.
    file, given, said = ROOT / "benchmarks" / script, sys.argv, StringIO()
    sys.argv = [str(file), *words]
    try:
        with chdir(ROOT), redirect_stdout(said):
            runpy.run_path(str(file), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise SystemExit(f"`{command}` failed: {end.code}") from end
    finally:
        sys.argv = given
    return said.getvalue().strip("\n") + "\n"


def filled(text: str) -> str:
    """The text with every table as its command prints it now."""
    return BLOCK.sub(lambda block: f"{block['head']}{printed(block['command'])}{block['end']}", text)


def without_data(text: str) -> list[str]:
    """Rows of tables with measured numbers that no command prints."""
    return [row[0] for row in MEASURED.finditer(CODE.sub("", BLOCK.sub("", text)))]


def differences(file: Path) -> Iterator[str]:
    """What is wrong with a document, line by line."""
    text = file.read_text()
    names = f"{file.name}, as it is", f"{file.name}, from the data"
    yield from difflib.unified_diff(text.splitlines(), filled(text).splitlines(), *names, lineterm="")
    if file.resolve().is_relative_to(ROOT / "docs") or file.name == "README.md":
        yield from (f"{file.name}: a table row without data: {row}" for row in without_data(text))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = "README.md and all in docs and benchmarks/results by default"
    made.add_argument("documents", nargs="*", type=Path, help=every)
    made.add_argument("--check", action="store_true", help="write nothing")
    return made


def main(words: Sequence[str] | None = None) -> None:
    given = parser().parse_args(words)
    files = given.documents or documents()
    if not given.check:
        for file in files:
            file.write_text(filled(file.read_text()))
    wrong = [line for file in files for line in differences(file)]
    print("\n".join(wrong), end="\n" if wrong else "")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
