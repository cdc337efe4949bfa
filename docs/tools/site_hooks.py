"""mkdocs hooks: the generated pages, and the repository's other documents, as parts of the site.

Links in documents are those of the repository, so that they work on its pages too; here they are made the site's.
"""

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))

import site_reference
from site_map import MOVED, ROOT, published

LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?(\))")
TABLE = re.compile(r"^<!-- from: (.+?) -->$", re.M)


def on_config(config: Any) -> Any:
    """The methods, a page each, in the order of the registry."""
    methods = ["methods/index.md", *(f"methods/{name}.md" for name in site_reference.METHODS)]
    next(entry for entry in config["nav"] if "Methods" in entry)["Methods"] = methods
    return config


def on_files(files: Files, config: Any) -> Files:
    for place, text in site_reference.pages().items():
        if (there := files.get_file_from_path(place)) is not None:
            files.remove(there)
        files.append(File.generated(config, place, content=text))
    for place, source in published().items():
        files.append(File.generated(config, place, abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to the site's places; the command of each table; details whose content is Markdown. A page that is alone in
    its tab has no list of pages.
    """
    source = next((path for path, place in MOVED.items() if place == page.file.src_uri), f"docs/{page.file.src_uri}")
    if page.file.src_uri.startswith("benchmarks/results/"):
        source = page.file.src_uri

    def moved(link: re.Match[str]) -> str:
        target = link[2]
        if ":" in target:
            return link[0]
        there = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        place = MOVED.get(there, there.removeprefix("docs/"))
        if not source.startswith("docs/notebooks/"):  # whose own pages have the files to download
            place = re.sub(r"\.ipynb$", ".md", place)
        return (
            f"{link[1]}{posixpath.relpath(place, posixpath.dirname(page.file.src_uri) or '.')}{link[3] or ''}{link[4]}"
        )

    if page.parent is None:  # the only page of its tab
        page.meta["hide"] = ["navigation"]
    markdown = LINK.sub(moved, markdown)
    data = posixpath.relpath("benchmarks/results/data.md", posixpath.dirname(page.file.src_uri) or ".")
    origin = f"[how, where and when its data were measured]({data})"
    markdown = TABLE.sub(lambda table: f"<small>`python benchmarks/{table[1]}` · {origin}</small>\n", markdown)
    markdown = markdown.replace("<!-- end -->", "")
    return markdown.replace("<details>", '<details markdown="1">')


__all__ = ["ROOT", "on_config", "on_files", "on_page_markdown"]
