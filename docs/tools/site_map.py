"""The places of the repository's documents in the site. `docs` is the site's root."""

from pathlib import Path

ROOT = Path(__file__).parents[2]

MOVED = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "LICENSE": "LICENSE",
    "README.md": "index.md",
}
"""{path in the repository: place in the site}, where a document is not in `docs`."""


def published() -> dict[str, Path]:
    """{place in the site: file} of documents outside of `docs`: texts and pictures of results, and example configs."""
    results = [file for kind in ("md", "png") for file in sorted((ROOT / "benchmarks" / "results").glob(f"*.{kind}"))]
    results.append(ROOT / "benchmarks" / "landscapes" / "README.md")
    configs = sorted((ROOT / "configs").rglob("*.yml"))
    moved = {place: ROOT / path for path, place in MOVED.items() if path != "README.md"}
    return moved | {file.relative_to(ROOT).as_posix(): file for file in (*results, *configs)}
