"""The report: its numbers are right, its page holds the log and nothing else, and works in a browser."""

import base64
import gzip
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from markupsafe import escape

from llmevo.reports.html.analysis import (
    ALL,
    FEWEST,
    Corrected,
    Subject,
    bootstrap_corrected,
    corrected,
    costs,
    effects,
    items,
)
from llmevo.reports.html.comparison import comparison_page
from llmevo.reports.html.page import run_page
from llmevo.reports.html.predictions import LLM, STATISTICS, predictions
from llmevo.reports.text import UNSAFE, printable
from llmevo.run.log import events
from llmevo.run.log.storage import read_log, shared_folder
from support import made_logs
from support.browser import Page
from support.synthetic import Synthetic
from support.workspace import Workspace

HOSTILE = "<script>window.pwned=1</script></script><img src=x onerror=window.pwned=1>"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Synthetic]:
    """A run whose every free text is an attack, and its page."""
    run = Synthetic(said=HOSTILE)
    folder = run.write(tmp_path_factory.mktemp("runs") / "hostile")
    (folder / "config.yml").write_text("api_key: sk-not-of-the-log\n")
    (folder / "report.html").write_text(run_page(folder))
    return folder, run


# Its numbers


def test_nothing_is_said_of_few_candidates() -> None:
    assert bootstrap_corrected([[[1.0, 0.0]]] * (FEWEST - 1), [1.0]) is None


def test_choosing_again_among_equals_finds_what_all_are_worth() -> None:
    random = np.random.default_rng(0)
    luck, left = [], []
    for _ in range(20):
        answers = (random.random((20, 100)) < 0.5).astype(float)
        found = bootstrap_corrected([[row[:60], row[60:]] for row in answers], [0.6, 0.4])
        assert found
        assert found.score == pytest.approx(answers.mean(1).max())
        luck.append(found.luck)
        left.append(found.mean - 0.5)
    assert np.mean(luck) > 0.06
    assert abs(np.mean(left)) < 0.02


def test_the_page_says_how_much_of_the_highest_score_is_luck(hostile: tuple[Path, Synthetic]) -> None:
    subject = Subject.of(hostile[0])
    found, leader = corrected(subject), subject.state.leader
    assert found
    assert leader
    assert found.score == pytest.approx(leader.value)
    assert found.low < found.mean < found.score
    page = (hostile[0] / "report.html").read_text()
    assert f"gives {found.mean:.3f} (95 % interval {found.low:.3f} to {found.high:.3f})" in page


def test_a_corrected_score_above_the_highest_has_no_luck(
    hostile: tuple[Path, Synthetic], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmevo.reports.html.page.corrected", lambda _: Corrected(0.5, 0.51, 0.4, 0.6))
    page = run_page(hostile[0])
    assert "gives 0.510 (95 % interval 0.400 to 0.600): this is no less than the score, so no luck is found." in page


def test_effects_are_those_of_the_landscape_task_by_task(tmp_path: Path) -> None:
    run = Synthetic(300, items=False)
    subject = Subject.of(run.write(tmp_path))
    found = effects(subject)
    assert [of.task for of in found] == [ALL, "sums", "dates", "words"]
    for of, slopes in zip(found, [run.slopes.mean(0), *run.slopes], strict=True):
        told = np.array([gene.effect for gene in of.genes])
        errors = np.array([gene.stderr for gene in of.genes])
        assert np.all(np.abs(told - slopes) < 5 * errors), of.task
        largest = int(np.abs(slopes).argmax())
        assert np.sign(told[largest]) == np.sign(slopes[largest])
        space, best = subject.space, subject.state.best
        assert best
        steps = space.to_unit(best.candidate.genes) - space.to_unit(space.clamp(space.uniform()))
        assert [gene.earned for gene in of.genes] == pytest.approx([*(told * steps)])


@pytest.mark.parametrize("logged", [False, True], ids=["replies and notes of an older log", "numbers in the log"])
def test_predictions_are_read(hostile: tuple[Path, Synthetic], tmp_path: Path, logged: bool) -> None:
    folder = hostile[0]
    if logged:
        rows: list[events.Event] = [event for event in read_log(folder) if not isinstance(event, events.Prompted)]
        for candidate in (row for event in rows if isinstance(event, events.Asked) for row in event.candidates):
            candidate |= {"note": "", "expected": {"llm": 0.6, "gaussian": 0.51}.get(candidate["origin"])}
        folder = made_logs.written(tmp_path / "run", rows)
    subject = Subject.of(folder)
    found = {prediction.candidate: prediction for prediction in predictions(subject)}
    for trial in subject.scored:
        said = {"llm": (LLM, 0.6), "gaussian": (STATISTICS, 0.51)}.get(trial.candidate.origin)
        prediction = found.get(trial.candidate.id)
        assert (prediction and (prediction.by, prediction.predicted)) == said
        assert prediction is None or prediction.achieved == trial.value
    assert {prediction.by for prediction in found.values()} == {LLM, STATISTICS}


def test_gained_and_lost_questions_add_up_to_the_difference_of_the_scores(hostile: tuple[Path, Synthetic]) -> None:
    subject = Subject.of(hostile[0])
    best, rival = subject.state.heldout["best"], subject.rival
    assert rival
    assert rival.score == max(row.score for row in subject.state.heldout.values() if row.kind == "parent")
    for of in items(subject):
        name = f"toy_{of.task}_heldout"
        difference = best.tasks[name]["acc,none"] - rival.tasks[name]["acc,none"]
        assert (
            (len(of.gained) - len(of.lost)) / of.questions == pytest.approx(difference) == pytest.approx(of.difference)
        )
        for item in of.gained:
            number = int(item.question.split()[1].rstrip("?"))
            assert (best.item_scores[name][number], rival.item_scores[name][number]) == (1, 0)
            assert item.answer.startswith(f"{number} ")
            assert item.best_reply.startswith(f"best says {number}")
            assert item.rival_reply.startswith(f"{rival.row} says {number}")


def test_the_phases_add_up_to_the_time_of_the_run(hostile: tuple[Path, Synthetic]) -> None:
    found, run = costs(Subject.of(hostile[0])), hostile[1]
    scored = sum(isinstance(event, events.Evaluated) for event in run.log)
    seconds = {phase.name: phase.seconds for phase in found.phases}
    assert seconds["merging candidates"] == scored
    assert seconds["scoring candidates"] == 5 * scored + sum(isinstance(event, events.Failed) for event in run.log)
    assert sum(seconds.values()) == pytest.approx(found.seconds)
    prompts = sum(isinstance(event, events.Prompted) for event in run.log)
    assert (found.calls, found.prompt_tokens, found.money) == (prompts, 1000 * prompts, pytest.approx(0.01 * prompts))


def test_questions_and_times_are_those_of_the_log(tmp_path: Path) -> None:
    taken: dict[str, Any] = {"tasks": {}, "items": 10, "score": 0.5, "stderr": 0.1, "seconds": {}, "cached": True}
    asked: dict[str, Any] = {**taken, "items": 7, "seconds": {"merge": 1.0, "evaluate": 2.0}, "cached": False}
    rows: list[events.Event] = [
        made_logs.started(),
        made_logs.asked(0, [0, 1, 2]),
        made_logs.evaluated(0, 0.5).model_copy(update={"items": 4, "rival": 1}),  # stopped, and asked the rest later
        made_logs.evaluated(0, 0.5),
        events.Evaluated(candidate=1, **taken),
        made_logs.failed(2),
        events.Selected(candidate=0, generation=1, finalists=1, **asked),
        events.Served(candidate=0, questions="search", generation=1, finalists=1, **asked),
        events.HeldOut(row="best", kind="best", candidate=0, **asked),
        events.HeldOut(row="one", kind="parent", candidate=0, **taken),
    ]
    found = costs(Subject.of(made_logs.written(tmp_path / "run", rows)))
    assert (found.questions, found.cached) == (4 + 10 + 7 + 7 + 7, 2)
    seconds = {phase.name: phase.seconds for phase in found.phases}
    assert (seconds["merging candidates"], seconds["scoring candidates"]) == (2, 5)
    assert (seconds["finalists"], seconds["held-out scores"]) == (6, 3)


# Its page


class Scripts(HTMLParser):
    """The scripts of a page, and whether anything in it asks for more."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.asking: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.asking += [tag for name in ("src", "srcset", "data", "onerror", "onclick") if name in given]
        self.asking += [tag] if tag in ("link", "img", "iframe", "object", "base", "form") else []
        if tag == "script":
            self.scripts.append((given, ""))

    def handle_data(self, data: str) -> None:
        if self.scripts and self.lasttag == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)


def packed(page: str, name: str) -> str:
    """What a page has in a packed script."""
    found = next(text for attributes, text in Scripts(page).scripts if attributes.get("id") == name)
    return gzip.decompress(base64.b64decode(found)).decode()


def test_texts_of_others_are_shown_and_not_run(hostile: tuple[Path, Synthetic]) -> None:
    page = (hostile[0] / "report.html").read_text()
    parsed = Scripts(page)
    assert [attributes.get("id") for attributes, _ in parsed.scripts] == ["data", "details", "plotly", None]
    assert not parsed.asking
    assert "<script>window" not in page
    assert "<img" not in page
    assert "&lt;script&gt;window.pwned=1&lt;/script&gt;" in page
    data = json.loads(parsed.scripts[0][1])
    assert any(HOSTILE in row["note"] for row in data["candidates"])
    assert any(HOSTILE in row["reason"] for row in data["candidates"])
    hovers = json.dumps(data["figures"]["search"])
    assert "<script" not in hovers
    assert "&lt;script" in hovers
    prompts = json.loads(packed(page, "details"))["prompts"]
    assert HOSTILE in prompts[0]["messages"][0]["content"]


def test_no_control_character_of_a_text_enters_the_page(tmp_path: Path) -> None:
    said = "red \x1b[31m, bell \x07, back \x08, turned \u202e\u2066, csi \x9b, tab \t."
    page = run_page(Synthetic(30, said=said).write(tmp_path))
    assert not UNSAFE.search(page)
    assert "red [31m, bell , back , turned , csi , tab \t." in page
    data, details = json.loads(Scripts(page).scripts[0][1]), json.loads(packed(page, "details"))
    assert any("red [31m, bell" in row["note"] for row in data["candidates"])
    assert (data, details) == (printable(data), printable(details))


def test_an_origin_of_an_edited_log_makes_no_link_in_a_legend(tmp_path: Path) -> None:
    folder = Synthetic(12).write(tmp_path)
    log = folder / "events.jsonl"
    link = "<a href='javascript:alert(1)'>x</a>"
    log.write_text(log.read_text().replace('"origin":"gaussian"', f'"origin":"{link}"'))
    figures = json.loads(Scripts(run_page(folder)).scripts[0][1])["figures"]
    names = [trace["name"] for trace in figures["search"]["data"]]
    assert any("javascript" in name for name in names)
    assert not any("<" in name for name in names)


def test_the_page_holds_nothing_from_outside_the_log(
    hostile: tuple[Path, Synthetic], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-environment")
    page = run_page(hostile[0])
    everything = page + packed(page, "details")
    assert page == (hostile[0] / "report.html").read_text()
    for secret in ("sk-not-of-the-log", "sk-of-the-environment", "/secret/place", str(Path.home())):
        assert secret not in everything


def test_older_logs_have_no_section_of_questions(tmp_path: Path) -> None:
    folder = Synthetic(12, items=False).write(tmp_path)
    page = run_page(folder)
    assert 'id="items"' not in page
    assert corrected(Subject.of(folder)) is None
    assert "Bootstrap bias correction" not in page
    assert 'id="candidates"' in page


def test_a_held_out_row_that_failed_is_shown_with_its_reason(tmp_path: Path) -> None:
    run = Synthetic(12)
    kept = [event for event in run.log if not (isinstance(event, events.HeldOut) and event.row == "best")]
    run.log = [*kept[:-1], made_logs.unscored("best", "best", "the metric is <inf>"), kept[-1]]
    page = run_page(run.write(tmp_path))
    assert "The best merge has no held-out score" in page
    assert "held-out row best failed: the metric is &lt;inf&gt;" in page


@pytest.mark.parametrize("length", [1, 2, 4, 9, 20])
def test_a_run_that_goes_on_says_how_far_it_is(tmp_path: Path, length: int) -> None:
    run = Synthetic(30)
    run.log = run.log[:length]
    page = run_page(run.write(tmp_path))
    assert "unfinished" in page
    assert "llmevo resume" in page


def test_a_run_in_which_everything_failed_shows_the_reasons(tmp_path: Path) -> None:
    run = Synthetic(12)
    lost = [
        events.Failed(candidate=event.candidate, reason="not finite", seconds={})
        for event in run.log
        if isinstance(event, events.Evaluated)
    ]
    kept = [event for event in run.log if not isinstance(event, events.Evaluated | events.HeldOut)]
    run.log = [*kept[:-1], *lost, kept[-1]]
    page = run_page(run.write(tmp_path))
    assert "Every candidate failed" in page
    assert "not finite" in page


def test_a_thousand_candidates_of_64_genes_fit_into_a_page(thousand: Path) -> None:
    page = (thousand / "report.html").read_text()
    assert len(page) < 4_000_000
    rows = json.loads(Scripts(page).scripts[0][1])["candidates"]
    assert len(rows) == 1000


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Synthetic(1000, slices=16, models=4).write(tmp_path_factory.mktemp("runs") / "thousand")
    (folder / "report.html").write_text(run_page(folder))
    return folder


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two optimizers, two seeds each, on one landscape."""
    root = tmp_path_factory.mktemp("runs")
    for optimizer in ("llm", "cma-es"):
        for seed in (0, 1):
            run = Synthetic(20, seed=0, items=False)
            started = run.log[0]
            assert isinstance(started, events.RunStarted)
            search = {"optimizer": optimizer, "budget": 20, "seed": seed}
            run.log[0] = started.model_copy(update={"config": {**started.config, "search": search}, "seed": seed})
            run.write(root / f"{optimizer}-{seed}")
    (root / "report.html").write_text(comparison_page(sorted(root.iterdir()), HOSTILE))
    return root


def test_every_figure_has_a_text_alternative(hostile: tuple[Path, Synthetic], comparison: Path) -> None:
    for folder, count in ((hostile[0], 9), (comparison, 2)):
        page = (folder / "report.html").read_text()
        drawn = json.loads(Scripts(page).scripts[0][1])["figures"]
        assert len(drawn) == count
        assert all(len(figure["alt"]) > 20 for figure in drawn.values())
        labels = re.findall(r'class="plot" id="plot-[\w-]+" role="img" aria-label="([^"]+)"', page)
        assert len(labels) == count
        assert all(any(escape(figure["alt"]) in label for label in labels) for figure in drawn.values())


def test_several_runs_make_a_comparison(comparison: Path) -> None:
    page = (comparison / "report.html").read_text()
    assert not Scripts(page).asking
    assert "<script>window" not in page
    assert page.count("held out") >= 1
    for run in ("llm-0", "llm-1", "cma-es-0", "cma-es-1"):
        assert run in page


def test_the_command_writes_the_page_where_it_is_asked_to(workspace: Workspace, comparison: Path) -> None:
    status, said = workspace.llmevo("report", comparison / "llm-0")
    assert (status, "report.html" in said) == (0, True)
    assert "Did it work?" in (comparison / "llm-0" / "report.html").read_text()
    status, _ = workspace.llmevo("report", comparison / "llm-0", comparison / "cma-es-0", "--out", "both.html")
    assert status == 0
    assert "Which optimizer did best?" in Path("both.html").read_text()
    assert "Everything on this page is from the runs' logs." in Path("both.html").read_text()
    shutil.copytree(comparison / "cma-es-0", "elsewhere/cma-es-0")
    places = (comparison / "llm-0", Path("elsewhere/cma-es-0"))
    assert workspace.llmevo("report", *places)[0] == workspace.llmevo("compare", *places)[0] == 0
    assert {"report.html", "comparison.md"} <= {file.name for file in Path().iterdir()}  # not in the common parent
    assert shared_folder([comparison / "llm-0", comparison / "cma-es-0"]) == comparison
    status, said = workspace.llmevo("report", "nowhere")
    assert (status, "nowhere" in said) == (2, True)
    status, said = workspace.llmevo("report", comparison / "llm-0", "--out", "no/such/place.html")
    assert (status, "--out" in said) == (2, True)


@pytest.mark.parametrize("value", ["NaN", "-Infinity", " inf"])
def test_a_number_that_is_none_is_refused_with_its_line(workspace: Workspace, tmp_path: Path, value: str) -> None:
    folder = Synthetic(12).write(tmp_path / "run")
    log = folder / "events.jsonl"
    lines = log.read_text().splitlines()
    place = next(number for number, line in enumerate(lines) if '"event":"evaluated"' in line)
    event = json.loads(lines[place])
    lines[place] = json.dumps({**event, "score": value})
    log.write_text("\n".join(lines) + "\n")
    status, said = workspace.llmevo("report", folder)
    assert status == 2
    assert f"events.jsonl:{place + 1}: is no event of llmevo (a number is NaN or infinite" in said
    lines[place] = json.dumps(event)
    event = json.loads(lines[0])
    event["prompts"] = {"chat.j2": value}
    log.write_text("\n".join([json.dumps(event), *lines[1:]]) + "\n")
    assert workspace.llmevo("report", folder)[0] == 0  # as a text it means nothing


def test_a_real_run_has_its_questions_and_replies_in_the_page(workspace: Workspace) -> None:
    workspace.finished()
    status, said = workspace.llmevo("report", "run")
    assert status == 0, said
    page, subject = Path("run/report.html").read_text(), Subject.of(Path("run"))
    found = items(subject)
    assert [of.questions for of in found] == [12]
    assert ('id="items"' in page) is True
    listed = json.loads(packed(page, "details"))["items"][0]
    differing = [*found[0].gained, *found[0].lost]
    assert len(listed["gained"]) + len(listed["lost"]) == len(differing)
    assert all(item.question.startswith("Q: ") and item.best_reply != item.rival_reply for item in differing)


# In a browser


def opened(window: Page, folder: Path, width: int = 1200, dark: bool = False) -> Page:
    window.resize(width, dark=dark)
    window.complaints()  # what was said and asked for before is not this page's
    window.requests()
    window.open(folder / "report.html")
    return window


def column(window: Page, place: int) -> list[str]:
    script = f"[...document.querySelectorAll('#candidates-table tr.row')].map(r => r.children[{place}].textContent)"
    return window.run(script)


@pytest.mark.browser
def test_the_page_opens_quietly_and_asks_for_nothing(window: Page, hostile: tuple[Path, Synthetic]) -> None:
    opened(window, hostile[0])
    sizes: list[Any] = window.run(
        "[...document.querySelectorAll('.plot')].map(p => [p.id, p.querySelector('svg').getBoundingClientRect().height,"
        " p.querySelector('svg').getBoundingClientRect().width])"
    )
    names = {name for name, height, width in sizes if height > 100 and width > 300}
    assert names == {f"plot-{name}" for name in ("search", "step", "trust", "calibration", "recipe")} | {
        f"plot-effect-{number}" for number in range(4)
    }
    for details in ("#effects-table", ".prompt", ".items", "#reproduce details"):
        window.run(f"document.querySelector('{details}').open = true")
    window.wait("document.querySelector('.prompt pre') && document.querySelector('.items .item')")
    assert HOSTILE in window.run("document.querySelector('.prompt').textContent")
    assert HOSTILE in window.run("document.querySelector('.items').textContent")
    window.click("#candidates-table tr.failed")
    window.wait("document.querySelector('tr.opened .failed')")
    assert HOSTILE in window.run("document.querySelector('tr.opened .failed').textContent")
    assert window.run("window.pwned === undefined")
    assert window.complaints() == []
    asked = {address for address in window.requests() if not address.startswith(("data:", "chrome:"))}
    assert asked == {(hostile[0] / "report.html").as_uri()}
    assert (
        window.run("performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith('data:'))")
        == []
    )


@pytest.mark.browser
def test_the_policy_of_the_page_refuses_what_is_not_its_own(window: Page, hostile: tuple[Path, Synthetic]) -> None:
    opened(window, hostile[0])
    window.run(
        "(() => { const s = document.createElement('script'); s.textContent = 'window.pwned = 1';"
        " document.head.append(s); return fetch('http://127.0.0.1:9/').catch(() => { window.refused = 1; }); })()"
    )
    window.wait("window.refused")
    assert window.run("window.pwned === undefined")
    assert any("Content Security Policy" in said for said in window.complaints())


@pytest.mark.browser
def test_candidates_are_sorted_filtered_and_opened(window: Page, hostile: tuple[Path, Synthetic]) -> None:
    opened(window, hostile[0])
    best = [float(score.split()[0]) for score in column(window, 1) if score]
    assert len(best) > 30
    assert best == sorted(best, reverse=True)
    window.click("#candidates-table th button")
    numbers = [int(number.strip("▸ ")) for number in column(window, 0)]
    assert numbers == sorted(numbers)
    assert window.run("document.querySelector('#candidates-table th').ariaSort") == "ascending"
    window.run(
        "(() => { const i = document.querySelector('#candidates-table input'); i.value = 'uniform';"
        " i.dispatchEvent(new Event('input')); })()"
    )
    assert len(column(window, 0)) == 1
    window.click("#candidates-table tr.row .open")
    text = window.wait("document.querySelector('tr.opened pre')?.textContent")
    number = int(column(window, 0)[0].strip("▾ "))
    assert yaml.safe_load(text) == Subject.of(hostile[0]).state.recipes[number]
    window.click("tr.opened .copy")
    window.wait("document.querySelector('tr.opened .copy').textContent === 'copied'")
    window.click("#candidates-table tr.row .open")
    assert window.run("document.querySelector('tr.opened')") is None


@pytest.mark.browser
def test_the_theme_is_the_systems_until_the_button_says_otherwise(
    window: Page, hostile: tuple[Path, Synthetic]
) -> None:
    shade = "Number(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])"
    paper = "document.querySelector('.plot .main-svg').style.background"
    opened(window, hostile[0])
    light, plot = window.run(shade), window.run(paper)
    opened(window, hostile[0], dark=True)
    dark = window.run(shade)
    assert dark < 64 < 192 < light
    assert window.run(paper) != plot
    window.click("#theme")
    window.wait("document.documentElement.dataset.drawn === 'light'")
    assert (window.run(shade), window.run(paper)) == (light, plot)
    window.open(hostile[0] / "report.html")
    assert window.run(shade) == light  # it is remembered
    window.run("localStorage.clear()")


@pytest.mark.browser
def test_a_phone_need_not_scroll_sideways(window: Page, hostile: tuple[Path, Synthetic], comparison: Path) -> None:
    for folder in (hostile[0], comparison):
        opened(window, folder, width=390)
        window.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        if folder == hostile[0]:
            window.click("#candidates-table tr.row")
            window.wait("document.querySelector('tr.opened pre') && document.querySelector('.items .item')")
        assert window.run("document.documentElement.scrollWidth") == 390
        sizes = "[...document.querySelectorAll('p, td, text')].map(e => parseFloat(getComputedStyle(e).fontSize))"
        assert min(window.run(sizes)) >= 10
        assert window.complaints() == []


@pytest.mark.browser
def test_a_thousand_candidates_come_a_hundred_at_a_time(window: Page, thousand: Path) -> None:
    opened(window, thousand)
    assert len(column(window, 0)) == 100
    assert "100 of 1000" in window.run("document.querySelector('#candidates-table .tools').textContent")
    window.run("document.querySelector('#candidates-table > button').scrollIntoView()")
    window.wait("document.querySelectorAll('#candidates-table tr.row').length >= 200")
    window.run("document.querySelectorAll('#candidates-table th button')[1].click()")
    lowest = [float(re.split(" ", score)[0]) for score in column(window, 1)[:100]]
    assert lowest == sorted(lowest)
    assert window.complaints() == []
