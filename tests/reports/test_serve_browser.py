"""Served runs in Chromium: what is new arrives without a reload and disturbs nothing; texts of others are texts."""

import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from llmevo.reports.web import server
from llmevo.reports.web.server import Server
from llmevo.run.log import events
from llmevo.run.log.storage import LOG, RunLog
from support.browser import Page, browser
from support.made_logs import whole_run, written
from support.served import address, served
from support.synthetic import Synthetic

pytestmark = [pytest.mark.browser, pytest.mark.usefixtures("quick")]

HOSTILE = "<script>window.pwned=1</script></script><img src=x onerror=window.pwned=1>"
STATUS = "document.querySelector('#status').textContent"
ROWS = "document.querySelectorAll('#candidates-table tr.row').length"


def opened(window: Page, at: Server, path: str = "", width: int = 1200) -> Page:
    """The page, once it follows its log."""
    window.resize(width)
    window.complaints()
    window.requests()
    window.driver.get(address(at, path))
    window.wait("document.documentElement.dataset.drawn && document.documentElement.dataset.seen")
    return window


def hostile(candidates: int = 30) -> list[events.Event]:
    """A log whose every free text is an attack, with workers."""
    log = Synthetic(candidates, said=HOSTILE).log
    worker = events.Worker(worker=f"1{HOSTILE}", change="lost", place=HOSTILE, reason=HOSTILE)
    return [log[0], events.Worker(worker="0", change="ready", place=HOSTILE), worker, *log[1:]]


def test_candidates_arrive_without_a_reload_and_disturb_nothing(window: Page, tmp_path: Path) -> None:
    log = whole_run()
    with RunLog(tmp_path / "run") as writer, served(tmp_path / "run") as at:
        for event in log[:9]:
            writer.append(event)
        opened(window, at)
        assert window.run(ROWS) == 6
        assert "running: 4 of 9 evaluations; best 0.500 ± 0.050 (#3)" in window.run(STATUS)
        window.run("(() => { window.same = true; })()")
        window.run("(() => { document.querySelector('.prompt').open = true; })()")
        window.wait("document.querySelector('.prompt pre')")
        window.click("#candidates-table tr.row .open")
        window.wait("document.querySelector('tr.opened pre')")
        window.run("document.querySelectorAll('#candidates-table .open')[1].focus()")
        focused = window.run("document.activeElement.ariaLabel")
        for event in log[9:13]:
            writer.append(event)
        window.wait(f"{STATUS}.includes('best 0.800 ± 0.050 (#4)') && {ROWS} === 9")
        window.wait("document.querySelector('header').textContent.includes('6 of 9')")  # the report follows
        assert window.run("document.querySelector('#candidates-table tr.best').textContent").startswith("▸4")
        assert window.run("document.querySelector('.prompt').open && document.querySelector('.prompt pre').textContent")
        assert window.run("document.querySelectorAll('tr.opened pre').length") == 1
        assert window.run("document.activeElement.ariaLabel") == focused
        for event in log[13:]:
            writer.append(event)
        window.wait(f"{STATUS}.includes('finished') && document.querySelector('#result .best')")
        window.wait("document.querySelector('#result').textContent.includes('The best merge scores +0.300')")
        assert window.run("window.same")
        assert window.complaints() == []
        asked = {url for url in window.requests() if not url.startswith(("data:", "chrome:"))}
        assert len(asked) > 2
        assert all(url.startswith(address(at)) for url in asked)


def test_texts_of_others_are_shown_and_not_run(window: Page, tmp_path: Path) -> None:
    log = hostile()
    with RunLog(tmp_path / "run") as writer, served(tmp_path) as at:
        for event in log[:20]:
            writer.append(event)
        opened(window, at, "runs/run/")
        for event in log[20:]:
            writer.append(event)
        window.wait(f"{STATUS}.includes('finished') && document.querySelector('.items')")
        window.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        window.wait("document.querySelector('.prompt pre') && document.querySelector('.items .item')")
        for place in ("#now", "#candidates", "#analyses", ".prompt", ".items", "#costs"):
            assert HOSTILE in window.run(f"document.querySelector('{place}').textContent"), place
        assert window.run("window.pwned === undefined")
        assert window.complaints() == []
        window.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=window.pwned=1>')")
        assert any("Content Security Policy" in said for said in window.complaints())
        assert window.run("window.pwned === undefined")


def test_two_viewers_at_once(window: Page, tmp_path: Path) -> None:
    log = whole_run()
    with RunLog(tmp_path / "run") as writer, served(tmp_path / "run") as at, browser() as other:
        for event in log[:6]:
            writer.append(event)
        for each in (window, other):
            opened(each, at)
        assert at.runs.runs[0].viewers == 2
        for event in log[6:]:
            writer.append(event)
        for each in (window, other):
            each.wait(f"{STATUS}.includes('finished') && {ROWS} === 9")
            assert each.complaints() == []


def test_a_page_that_is_not_seen_leaves_its_connection_and_catches_up(
    window: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "BEAT", 0.1)
    folder = written(tmp_path / "run", whole_run()[:9])

    def show(is_hidden: str, at: Server, viewers: int) -> None:
        window.run(f"Object.defineProperty(document, 'hidden', {{value: {is_hidden}, configurable: true}})")
        window.run("document.dispatchEvent(new Event('visibilitychange'))")
        WebDriverWait(window.driver, 20, 0.05).until(lambda _: at.runs.runs[0].viewers == viewers)

    with served(folder) as at:
        opened(window, at)
        show("true", at, 0)
        written(folder, whole_run())
        show("false", at, 1)
        window.wait(f"{STATUS}.includes('finished') && {ROWS} === 9")


def test_a_phone_need_not_scroll_sideways(window: Page, tmp_path: Path) -> None:
    written(tmp_path / f"a-run-with-{'a-very-long-' * 8}name", hostile())
    written(tmp_path / "broken", hostile()[:9])
    with (tmp_path / "broken" / LOG).open("a") as out:
        out.write('{"event": "' + "nonsense" * 30 + '"}\n')
    with served(tmp_path) as at:
        for path in ("", *(f"runs/{run.name}/" for run in at.runs.runs), "compare"):
            window.resize(360)
            window.driver.get(address(at, path))
            window.wait("document.documentElement.dataset.drawn")
            window.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
            if path and path != "compare":
                window.wait("document.querySelector('tr.row')")
                window.click("#candidates-table tr.row")
                window.wait("document.querySelector('tr.opened pre') && document.querySelector('.prompt pre')")
            else:
                window.wait("document.readyState === 'complete'")
            assert window.run("document.documentElement.scrollWidth") == 360, path
            assert window.complaints() == []


def test_a_broken_and_a_deleted_run_are_said(window: Page, tmp_path: Path) -> None:
    log, said = whole_run(), list[str]()
    for name in ("one", "two"):
        written(tmp_path / name, log[:9])
    with served(tmp_path, said=said) as at:
        opened(window, at, "runs/one/")
        with (tmp_path / "one" / LOG).open("a") as out:
            out.write("nonsense\n")
        window.wait("document.querySelector('[role=alert]')?.textContent.includes('events.jsonl:10: is no event')")
        assert window.run(f"{STATUS}.startsWith('broken: 4 of 9')")
        opened(window, at)
        shutil.rmtree(tmp_path / "two")
        window.wait("document.querySelector('.reason') && document.querySelector('strong.deleted')")
        window.driver.get(address(at, "runs/two/"))
        window.wait("document.querySelector('[role=alert]')?.textContent.includes('was deleted or moved')")
        window.driver.get(address(at, "runs/three/"))
        window.wait("document.querySelector('main').textContent.includes('no such run')")
    assert any("events.jsonl:10" in line for line in said)
    assert any("was deleted or moved" in line for line in said)


def test_runs_appear_in_the_list_and_are_compared(window: Page, tmp_path: Path) -> None:
    def run(seed: int) -> list[events.Event]:
        log = Synthetic(20, seed=0, items=False).log
        started = log[0]
        assert isinstance(started, events.RunStarted)
        search = {"optimizer": "llm", "budget": 20, "seed": seed}
        return [started.model_copy(update={"config": {**started.config, "search": search}, "seed": seed}), *log[1:]]

    written(tmp_path / "b", run(0))
    with served(tmp_path) as at:
        opened(window, at)
        window.wait("document.querySelector('#list input')")
        window.click("#list input")
        written(tmp_path / "a", run(1))
        window.wait("document.querySelectorAll('#list input').length === 2")
        assert window.run("[...document.querySelectorAll('#list input')].map(i => i.checked)") == [False, True]
        window.click("#list input")
        window.click("form button")
        window.wait("document.querySelector('h2')?.textContent === 'Which optimizer did best?'")
        window.wait("document.documentElement.dataset.drawn")
        assert window.complaints() == []


def test_the_token_opens_the_page(window: Page, tmp_path: Path) -> None:
    with served(written(tmp_path / "run", whole_run()), host="0.0.0.0") as at:
        for path, said in (("", "is missing"), ("?token=wrong", "is wrong")):
            window.driver.get(address(at, path))
            window.wait(f"document.querySelector('main').textContent.includes('The token {said}')")
        window.driver.get(address(at, f"?token={at.access.token}"))
        window.wait("document.documentElement.dataset.drawn && document.documentElement.dataset.seen")
        assert window.run("location.search") == ""
        assert window.run("document.cookie") == ""
        window.driver.refresh()
        window.wait("document.documentElement.dataset.seen")
        window.driver.delete_all_cookies()


def test_a_lost_connection_is_said_and_mended(window: Page, tmp_path: Path) -> None:
    folder, lost = written(tmp_path / "run", whole_run()[:8]), "document.querySelector('#connection').textContent"
    with served(folder) as at:
        opened(window, at)
        port = at.server_port
    window.wait(f"{lost}.includes('is lost')")
    written(folder, whole_run())
    with served(folder, port=port):
        window.wait(f"!{lost} && {STATUS}.includes('finished') && {ROWS} === 9")


def test_a_keyboard_and_a_screen_reader_find_their_way(window: Page, tmp_path: Path) -> None:
    with served(written(tmp_path / "run", hostile())) as at:
        opened(window, at)

        def press(key: str) -> str:
            ActionChains(window.driver).send_keys(key).perform()
            return window.run("document.activeElement.textContent || document.activeElement.ariaLabel")

        assert press(Keys.TAB) == "Skip to the content"
        assert press(Keys.TAB) == "light / dark"
        assert press(Keys.TAB) == "Result"
        window.run("document.querySelector('.skip').focus()")
        press(Keys.ENTER)
        assert window.run("document.activeElement.id") == "main"
        landmarks = "['header', 'nav[aria-label]', 'section[aria-label=Now]', 'main', 'footer']"
        assert window.run(f"{landmarks}.every(s => document.querySelectorAll(`body > ${{s}}`).length === 1)")
        assert window.run("document.querySelector('#news').getAttribute('role')") == "status"
        plots = "[...document.querySelectorAll('.plot')].map(p => [p.getAttribute('role'), p.ariaLabel.length > 40])"
        found = window.run(plots)
        assert len(found) > 6
        assert all(each == ["img", True] for each in found)
        window.run("document.querySelector('#candidates-table tr.row .open').focus()")
        press(Keys.ENTER)
        window.wait("document.querySelector('tr.opened pre')")
        assert window.run("document.activeElement.ariaExpanded") == "true"
        fields = "[...document.querySelectorAll('button, input, a')].every(e => e.textContent.trim() || e.ariaLabel)"
        assert window.run(fields)
        levels = "[...document.querySelectorAll('h1, h2, h3')].map(h => Number(h.nodeName[1]))"
        order = window.run(levels)
        assert order[0] == 1
        assert all(later - before <= 1 for before, later in pairwise(order))
