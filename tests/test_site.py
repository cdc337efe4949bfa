"""The documentation: every key, command, event, method and optimizer has its place; links and examples hold."""

import json
import posixpath
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import site_map
import site_reference
import site_schemas
import typer
import yaml

from llmevo.cli.app import COMMANDS, app
from llmevo.cli.run import run
from llmevo.config import Config, parse_config, read_config
from llmevo.merging.methods.registry import METHODS
from llmevo.models.yaml import read_yaml
from support.browser import browser
from support.workspace import Workspace

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SITE = ROOT / "build" / "site"
EXAMPLES = [ROOT / "configs" / "quickstart.yml", *sorted((ROOT / "configs" / "examples").glob("*.yml"))]
GENERATED = site_reference.pages()
NAV: Any = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def texts() -> dict[str, str]:
    """{path in the repository: Markdown} of all documents, the generated ones included."""
    files = [*sorted(DOCS.rglob("*.md")), *(file for file in site_map.published().values() if file.suffix == ".md")]
    written = {file.relative_to(ROOT).as_posix(): file.read_text() for file in (ROOT / "README.md", *files)}
    return written | {f"docs/{place}": text for place, text in GENERATED.items()}


TEXTS = texts()


def fences(path: str, language: str) -> list[str]:
    return [text for kind, text in FENCE.findall(TEXTS[path]) if kind == language]


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as mkdocs makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.M):
        given = re.search(r"\{ #(\S+) \}$", heading)
        plain = re.sub(r"[^\w\s-]", "", heading).strip().lower()
        found.add(given[1] if given else re.sub(r"[-\s]+", "-", plain))
    return found


def schema(name: str) -> Any:
    return jsonschema.Draft202012Validator(json.loads((DOCS / "schemas" / name).read_text()))


# ---- schemas


@pytest.mark.parametrize("name", site_schemas.SCHEMAS)
def test_a_published_schema_is_that_of_the_code(name: str) -> None:
    written = (DOCS / "schemas" / name).read_text()
    assert written == site_schemas.text_of(name), "`python docs/tools/site_schemas.py` writes the schemas anew"
    jsonschema.Draft202012Validator.check_schema(json.loads(written))


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_config_is_read_and_names_its_schema(file: Path) -> None:
    line = file.read_text().splitlines()[0]
    assert line.startswith("# yaml-language-server: $schema=")
    assert (file.parent / line.partition("=")[2]).resolve() == DOCS / "schemas" / "config.json"
    config = read_config(file)
    schema("config.json").validate(read_yaml(file.read_text()))
    for folder in config.task_search_path:
        assert [*(file.parent / folder).glob("*.yaml")]
    for task in config.tasks:
        assert all((file.parent / path.partition(":")[0]).exists() for path in (task.text, task.function) if path)


@pytest.mark.parametrize("name", ["lora-adapters", "keep-the-general-model"])
def test_the_tasks_of_an_example_config_are_asked_as_it_says(name: str, workspace: Workspace) -> None:
    examples = ROOT / "configs" / "examples"
    shutil.copytree(examples / "own_tasks", workspace.root / "own_tasks")
    values: Any = read_yaml((examples / f"{name}.yml").read_text())
    public = [task for task in values["tasks"] if task.get("name", "").startswith("arc_")]  # need the hub
    values["tasks"] = [task for task in values["tasks"] if task not in public]
    values |= {"constraints": []} if public else {}
    values["genome"] |= {"base_model": "base", "models": ["one", "two"], "merge_method": "task_arithmetic"}
    if prepare := values["genome"].get("prepare"):
        prepare["tasks"] = dict(zip(("one", "two"), prepare["tasks"].values(), strict=True))
    values |= {"heldout": [], "apply_chat_template": False}
    (workspace.root / "config.yml").write_text(yaml.safe_dump(values))
    for file in workspace.root.glob("*/config.json"):  # replies of the examples take more than a tiny context
        file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 2048}))
    status, printed = workspace.llmevo("inspect", "config.yml")
    assert status == 0, printed
    assert "no finalists" not in printed
    assert "genome.prepare" not in printed


MISTAKES: list[dict[str, Any]] = [
    {"serach": {}},
    {"search": {"optimizer": "cmaes"}},
    {"tasks": [{"weight": 1}]},
    {"genome": {"models": ["a"], "merge_method": "tie"}},
    {"search": {"budget": {"hours": 1}}},
    {"search": {"racing": "no"}},
]


@pytest.mark.parametrize("change", MISTAKES, ids=str)
def test_the_schema_of_configs_refuses_what_the_config_refuses(change: dict[str, Any]) -> None:
    good = {"genome": {"models": ["a", "b"], "merge_method": "linear"}, "tasks": ["arc_easy_train"]}
    schema("config.json").validate(good)
    assert not schema("config.json").is_valid({**good, **change})
    with pytest.raises(Exception, match=r"config\.yml"):
        parse_config({**good, **change}, "config.yml")


@pytest.mark.parametrize("file", sorted((ROOT / "tests" / "golden").glob("*.jsonl")), ids=lambda file: file.stem)
def test_logs_and_their_recipes_conform_to_the_schemas(file: Path) -> None:
    of_event, of_recipe = schema("events.json"), schema("recipe.json")
    for line in map(json.loads, file.read_text().splitlines()):
        of_event.validate(line)
        for candidate in line.get("candidates", []) if line["event"] == "asked" else []:
            of_recipe.validate(candidate["recipe"])
            assert not of_recipe.is_valid({**candidate["recipe"], "merge_methods": "ties"})
        assert not of_event.is_valid({**line, "event": "asekd"})


# ---- the reference


def test_every_key_of_the_config_has_its_entry_and_a_text() -> None:
    page = GENERATED["reference/config.md"]
    parts = json.loads((DOCS / "schemas" / "config.json").read_text())
    models = [parts, *(one for name, one in parts["$defs"].items() if name not in ("ModelReference", "ModelPath"))]
    known = {key for model in models for key in (model.get("properties") or model["anyOf"][-1]["properties"])}
    entries = dict(re.findall(r"^### `([\w.]+)` \{.*?\n\n\*.*\*\n\n(.*)$", page, re.M))
    assert known == {place.rpartition(".")[2] for place in entries}
    assert len(known) > 90
    bare = r"^### `([\w.]+)` .*\n\n\*.*\*\n\n(?=#|Keys|$)"
    for text in (page, GENERATED["reference/recipe.md"]):
        assert re.findall(bare, text, re.M) == [], "document each key below it"


def test_every_command_has_its_entry_with_all_options() -> None:
    page, group = GENERATED["reference/commands.md"], typer.main.get_command(app)
    commands: dict[str, Any] = group.commands  # pyright: ignore[reportAttributeAccessIssue]
    assert {function.__name__ for function in COMMANDS} == commands.keys()
    for name, command in commands.items():
        section = page.partition(f"## `llmevo {name}`\n")[2].partition("\n## ")[0]
        options = {word for one in command.params for word in one.opts if word.startswith("--")} - {"--help"}
        assert options == {*re.findall(r"^\| `(--[\w-]+)", section, re.M)}, name


def test_every_event_has_its_entry() -> None:
    page = GENERATED["reference/events.md"]
    names = {site_reference.event_name(model) for model in site_schemas.event_models()}
    assert names == {*re.findall(r"^## `(\w+)`$", page, re.M)}
    assert len(names) > 12
    assert "| `item_scores` |" in page


def test_every_merge_method_has_its_row_with_its_genes_and_its_page() -> None:
    text = TEXTS["docs/methods/index.md"]
    rows = {
        name: (link, genes) for name, link, genes in re.findall(r"^\| \[`(\w+)`\]\((\S+)\) \| ([^|]+) \|", text, re.M)
    }
    expected = {
        name: (f"{name}.md", ", ".join(site_reference.genes_of(method)) or "none") for name, method in METHODS.items()
    }
    assert rows == expected, "docs/methods/index.md has a row for each method, with its genes"
    for name in METHODS:
        page = GENERATED[f"methods/{name}.md"]
        for heading in ("When to use it", "Formula", "Parameters and genes", "Cost", "Parity", "Reference"):
            assert len(page.partition(f"## {heading}\n")[2].partition("\n## ")[0].strip()) > 10, (name, heading)


@pytest.mark.parametrize("place", site_reference.method_pages())
def test_the_page_of_a_method_is_that_of_the_code(place: str) -> None:
    message = "`python docs/tools/site_reference.py` writes the pages of methods anew"
    assert (DOCS / place).read_text() == GENERATED[place], message


def test_every_optimizer_has_its_entry_and_is_explained_among_the_others() -> None:
    page, search = GENERATED["reference/optimizers.md"], TEXTS["docs/concepts/search.md"]
    known = re.findall(r"[\w-]+", site_reference.parameters(run)["--optimizer TEXT"].removeprefix("One of"))
    parts = json.loads((DOCS / "schemas" / "config.json").read_text())["$defs"]
    assert known == parts["Search"]["properties"]["optimizer"]["enum"] == re.findall(r"^## `([\w-]+)`$", page, re.M)
    for name in known:
        assert len(page.partition(f"## `{name}`\n")[2].partition("\n## ")[0].strip()) > 40
        assert f"`{name}`" in search


# ---- pages


def nav_pages(entries: Any) -> Iterator[str]:
    for entry in entries:
        value: Any = next(iter(entry.values())) if isinstance(entry, dict) else entry
        yield from nav_pages(value) if isinstance(value, list) else [value]


def test_every_page_is_in_the_navigation() -> None:
    methods = {place for place in GENERATED if place.startswith("methods/")} | {"methods/index.md"}
    there = {file.relative_to(DOCS).as_posix() for file in DOCS.rglob("*.md")} | GENERATED.keys()
    there |= {place for place in site_map.published() if place.endswith(".md")}
    assert {*nav_pages(NAV)} | methods == there


def test_every_internal_link_leads_to_a_file_or_a_heading() -> None:
    broken: list[str] = []
    for path, text in TEXTS.items():
        for link in LINK.findall(FENCE.sub("", text)):
            target, _, anchor = link.partition("#")
            if ":" in target:
                continue
            place = posixpath.normpath(posixpath.join(posixpath.dirname(path), target)) if target else path
            exists = place in TEXTS or (ROOT / place).is_file()
            if not exists or (anchor and place in TEXTS and anchor not in anchors(TEXTS[place])):
                broken.append(f"{path}: {link}")
    assert not broken
    assert sum(len(LINK.findall(text)) for text in TEXTS.values()) > 150


def test_the_readme_is_short_and_has_what_a_new_user_needs() -> None:
    text = TEXTS["README.md"]
    assert len(text.splitlines()) <= 150
    config = fences("README.md", "yaml")[0]
    assert len(config.splitlines()) <= 12
    for words in ("make quickstart ", "make test ", "pip install .", "llmevo run config.yml", "docs/first-merge.md"):
        assert words in text


GUIDES = [
    path for path in TEXTS if re.match(r"README|docs/(guides|workers|export|get|first|paths|preparation|models)", path)
]


@pytest.mark.parametrize("path", GUIDES)
def test_the_configs_of_a_guide_are_valid(path: str) -> None:
    whole = {"genome": {"models": ["a", "b"], "merge_method": "linear"}, "tasks": ["arc_easy_train"]}
    for block in fences(path, "yaml"):
        values: Any = read_yaml(block)
        if {"genome", "tasks"} <= values.keys():
            assert block.startswith("# yaml-language-server: $schema=llmevo.schema.json\n"), "editors know its keys"
        if values.keys() <= Config.model_fields.keys():
            parse_config({**whole, **values}, path)
            schema("config.json").validate({**whole, **values})


@pytest.mark.parametrize("path", TEXTS)
def test_the_commands_in_a_document_exist_with_their_options(path: str) -> None:
    options = {function.__name__: " ".join(site_reference.parameters(function)) for function in COMMANDS}
    shown = [line.partition(" #")[0] for block in fences(path, "sh") for line in block.splitlines()]
    shown += re.findall(r"`(llmevo [^`]+)`", FENCE.sub("", TEXTS[path]).replace("\n", " "))
    for line in shown:
        if call := re.search(r"(?:^|-- |\$ )llmevo (\w+)(.*)", line):
            if call[1] == "COMMAND":
                continue
            assert call[1] in options, line
            for option in re.findall(r" (--[\w-]+)", call[2]):
                assert option in (*options[call[1]].replace(",", " ").split(), "--help"), line


def first_merge() -> dict[str, str]:
    """The files of the page, with sixty questions instead of two."""
    text = TEXTS["docs/first-merge.md"]
    files = dict(re.findall(r"`([\w/]+\.\w+)`:\n\n```\w+\n(.*?)^```$", text, re.M | re.S))
    assert files.keys() == {"support.jsonl", "support.yaml", "config.yml"}
    two = [json.loads(line) for line in files["support.jsonl"].splitlines()]
    rows = [{**two[place % 2], "question": f"{two[place % 2]['question']} ({place})"} for place in range(60)]
    files["support.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows)
    files["config.yml"] = files["config.yml"].replace("models/", "")
    return files


def test_init_writes_the_files_of_the_first_merge(workspace: Workspace) -> None:
    files = first_merge()
    (workspace.root / "support.jsonl").write_text(files["support.jsonl"])
    settings = workspace.root / "base" / "tokenizer_config.json"
    plain = {key: value for key, value in json.loads(settings.read_text()).items() if key != "chat_template"}
    settings.write_text(json.dumps(plain))
    (workspace.root / "base" / "chat_template.jinja").unlink(missing_ok=True)
    assert workspace.llmevo("init", "one", "two", "--base", "base", "--task", "support.jsonl")[0] == 0
    for name in ("support.yaml", "config.yml"):
        assert read_yaml((workspace.root / name).read_text()) == read_yaml(files[name])


def test_the_first_merge_runs_as_its_page_says(workspace: Workspace) -> None:
    files = first_merge()
    files["config.yml"] = files["config.yml"].replace("budget: 60", "budget: 8")
    for name, content in files.items():
        (workspace.root / name).write_text(content)
    status, printed = workspace.llmevo("inspect", "config.yml")
    assert status == 0, printed
    asked = re.search(r"(\d+) search, (\d+) selection, (\d+) held-out questions; ± (\S+) on the held", printed)
    assert asked
    assert sum(map(int, asked.groups()[:3])) == 60
    assert asked[4] == f"{(0.6 * 0.4 / int(asked[3])) ** 0.5:.2f}"
    status, printed = workspace.llmevo("run", "config.yml")
    assert status == 0, printed
    assert "held out: uniform" in printed
    assert workspace.llmevo("report", "runs/config")[0] == 0
    assert workspace.llmevo("export", "runs/config", "uniform", "--candidate", "0")[0] == 0
    assert workspace.state("runs/config").trials[0].candidate.origin == "uniform"
    assert (workspace.root / "uniform" / "model.safetensors").exists()
    # A pack, as the guide on sharing says
    assert workspace.llmevo("export", "runs/config", "pack", "--recipe-only")[0] == 0
    assert workspace.llmevo("replay", "pack", "--verify")[0] == 0
    assert workspace.llmevo("report", "pack")[0] == 0


def test_no_picture_loads_a_font_from_elsewhere() -> None:
    for picture in DOCS.glob("*.svg"):
        assert 'url("http' not in picture.read_text(), f"{picture.name}: remove its @font-face"


@pytest.mark.browser
@pytest.mark.skipif(not SITE.exists(), reason="`make docs` builds the site")
def test_the_site_loads_nothing_from_elsewhere_and_fits_a_phone() -> None:
    with browser() as page:
        for width in (390, 1280):
            page.resize(width, dark=width == 390)
            for place in (
                "index",
                "models",
                "compare",
                "reference/config",
                "reference/python",
                "notebooks/quickstart",
                "benchmarks/optimizers",
            ):
                page.driver.get((SITE / f"{place}.html").as_uri())
                page.wait("document.readyState === 'complete'")
                whole, seen = (page.run(f"document.documentElement.{name}") for name in ("scrollWidth", "clientWidth"))
                assert whole <= seen, (place, width)
        asked = page.requests()
    assert len(asked) > 12
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:", "about:", "chrome"))] == []
