"""Pages by axe-core's rules, by keyboard, and as a screen reader reads them."""

import re
from pathlib import Path

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from llmevo.reports.html.page import run_page
from llmevo.run.log.storage import RunLog
from support.axe import axe, violations
from support.browser import Page
from support.made_logs import whole_run, written
from support.served import address, served
from support.synthetic import Synthetic

pytestmark = [pytest.mark.browser, pytest.mark.usefixtures("quick")]


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> str:
    return axe(tmp_path_factory.mktemp("axe"))


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (360, True)])
def test_no_page_violates_the_guidelines(window: Page, script: str, tmp_path: Path, width: int, dark: bool) -> None:
    found = dict[str, list[str]]()
    finished = Synthetic(30, said="a note & more").write(tmp_path / "finished")
    (finished / "report.html").write_text(run_page(finished))
    written(tmp_path / "other", whole_run())
    with RunLog(tmp_path / "running") as writer, served(tmp_path) as at:
        for event in whole_run()[:11]:
            writer.append(event)
        pages = {
            (finished / "report.html").as_uri(),
            *(address(at, path) for path in ("", "runs/finished/", "runs/running/", "runs/gone/")),
        }
        for url in sorted(pages):
            window.resize(width, dark=dark)
            window.driver.get(url)
            window.wait("document.documentElement.dataset.drawn")
            window.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
            if opener := window.run("document.querySelector('#candidates-table .open')"):
                window.driver.execute_script("arguments[0].click()", opener)
                window.wait("document.querySelector('tr.opened pre')")
            if said := violations(window, script):
                found[url] = said
    assert found == {}


def spoken(window: Page) -> list[tuple[str, str, dict[str, object]]]:
    """Return what a screen reader reads: role, name and properties, in the order of the page."""
    nodes = window.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    return [
        (
            node["role"]["value"],
            node.get("name", {}).get("value", ""),
            {each["name"]: each["value"].get("value") for each in node.get("properties", [])},
        )
        for node in nodes
        if not node["ignored"]
    ]


def test_a_screen_reader_reads_candidates_figures_and_a_new_best(window: Page, tmp_path: Path) -> None:
    log = whole_run()
    with RunLog(tmp_path / "run") as writer, served(tmp_path / "run") as at:
        for event in log[:9]:
            writer.append(event)
        window.resize(1200)
        window.driver.get(address(at))
        window.wait("document.documentElement.dataset.drawn && document.documentElement.dataset.seen")
        read = spoken(window)
        names = {(role, name) for role, name, _ in read}
        assert ("table", "Every candidate") in names
        assert {name for role, name in names if role == "columnheader"} >= {"#", "score ▼", "words", "family", "note"}
        assert ("rowheader", "open 3, the best 3") in names
        assert ("button", "open 3, the best") in names
        pictures = [name for role, name in names if role == "image"]
        assert any("Every candidate, and the best so far. The best score of 4 candidates" in name for name in pictures)
        assert all(len(name) > 40 for name in pictures), pictures
        news = "document.querySelector('#news')"
        assert sum(role == "status" and found.get("live") == "polite" for role, _, found in read) >= 2
        window.run(f"(() => {{ window.place = {news}; }})()")
        for event in log[9:11]:
            writer.append(event)
        window.wait(f"{news}.textContent.includes('the best candidate so far is number 4 with 0.800')")
        assert window.run(f"window.place === {news}")  # a region that was replaced would not be read


@pytest.mark.parametrize("width", [1200, 360])
def test_every_control_is_reached_by_keyboard_and_shows_it(window: Page, tmp_path: Path, width: int) -> None:
    controls = "a[href], button, input, summary, [tabindex='0']"
    seen = f'[...document.querySelectorAll("{controls}")].filter(e => e.checkVisibility({{visibilityProperty: true}}))'
    with served(Synthetic(30).write(tmp_path / "run")) as at:
        window.resize(width)
        window.driver.get(address(at))
        window.wait("document.documentElement.dataset.drawn && document.documentElement.dataset.seen")
        window.run("document.querySelector('.table .open').click()")
        window.wait("document.querySelector('tr.opened pre')")
        count = window.run(f"{seen}.length")
        window.run(
            "(() => { window.met = new Set(); window.bare = []; document.addEventListener('focusin', ({target}) => {"
            " const style = getComputedStyle(target); window.met.add(target);"
            " if (style.outlineStyle === 'none' && !target.matches('.skip')) {"
            " window.bare.push(target.outerHTML.slice(0, 99)); }"
            " }); })()"
        )
        for _ in range(count // 20 + 2):
            ActionChains(window.driver).send_keys(Keys.TAB * 20).perform()
        assert window.run(f"{seen}.filter(e => !window.met.has(e)).map(e => e.outerHTML.slice(0, 99))") == []
        assert window.run("window.bare") == []


def seconds(left: str) -> int:
    """The hours, minutes and seconds of a text."""
    hours, minutes, rest = (int(part) for part in re.findall(r"\d+", left))
    return (hours * 60 + minutes) * 60 + rest


def test_the_time_left_counts_down_and_says_when_a_result_is_late(window: Page, tmp_path: Path) -> None:
    left = "document.querySelector('[data-later]').textContent"
    with RunLog(tmp_path / "run") as writer, served(tmp_path) as at:
        for event in whole_run()[:9]:
            writer.append(event)
        for path, late in (("runs/run/", "; the next result takes longer than expected"), ("", ", late")):
            window.driver.get(address(at, path))
            window.wait("document.documentElement.dataset.seen && document.querySelector('[data-later]')")
            window.run(
                "(() => { const d = document.querySelector('[data-later]').dataset; d.step = 36000; d.later = 100; })()"
            )
            window.wait(f"/(10:0|9:5)\\d:\\d\\d/.test({left}) && !{left}.includes('late')")
            first = window.run(left)
            window.wait(f"{left} !== {first!r}")
            assert seconds(window.run(left)) < seconds(first) <= 36100
            window.run("(() => { document.querySelector('[data-later]').dataset.step = -1; })()")
            window.wait(f"{left}.includes('1:40') && {left}.endsWith({late!r})")
    window.wait("!document.querySelector('[data-later]')")  # nothing is known any more
