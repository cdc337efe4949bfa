"""Runs in a browser: logs are read once for all viewers, and only by those who may."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from llmevo.errors import RunError, UserError
from llmevo.reports.html.analysis import Subject
from llmevo.reports.html.llm_analyses import analyses
from llmevo.reports.web import followed, server
from llmevo.reports.web.followed import Followed, Runs
from llmevo.reports.web.server import TOKEN, Access, is_loopback
from llmevo.run.log import events, storage
from llmevo.run.log.storage import LOG, RunLog
from support.made_logs import evaluated, line, started, whole_run, written
from support.served import asked, served, stream
from support.workers import until
from support.workspace import Workspace

REAL = Path(__file__).parents[2] / "benchmarks" / "results" / "quickstart-llm" / "seed-0.jsonl"


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    for name in ("POLL", "IDLE", "REFRESH"):
        monkeypatch.setattr(followed, name, 0.01)


def more(run: Path, *log: events.Event) -> None:
    with (run / LOG).open("a") as stream:
        stream.write("".join(map(line, log)))


def news(run: Followed, since: str = "") -> dict[str, Any]:
    run.read()
    return json.loads(run.message(since)[1])


def made_of(page: bytes) -> str:
    """The version of the log that a page was made from."""
    return page.partition(b'data-version="')[2].partition(b'"')[0].decode()


# Following


def test_each_line_is_read_once_however_many_watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, read = whole_run(), list[str]()
    real = storage.parse_event
    monkeypatch.setattr(storage, "parse_event", lambda text, place: (read.append(place), real(text, place))[1])
    run = Followed(written(tmp_path / "run", log[:5]), "run", "./")
    for _ in range(3):
        run.page()
        news(run)
    more(tmp_path / "run", *log[5:9])
    for since in ("", "", run.version):
        run.page()
        news(run, since)
    assert [int(place.rpartition(":")[2]) for place in read] == [*range(1, 10)]


def test_a_viewer_is_told_what_has_changed_since_its_version(tmp_path: Path) -> None:
    log = whole_run()
    run = Followed(written(tmp_path / "run", log[:4]), "run", "./")
    page = run.page().decode()
    assert f'data-version="{run.version}"' in page
    before = run.version
    assert news(run, before)["rows"] == []
    more(tmp_path / "run", log[4])
    found = news(run, before)
    assert [(row["id"], row["score"], row["best"]) for row in found["rows"]] == [(1, 0.35, False), (2, 0.4, True)]
    assert "2 of 9" not in found["now"]
    assert "3 of 9 evaluations; best 0.400 ± 0.050 (#2)" in found["now"]
    assert found["version"] == run.version == f"{before[:-1]}5"
    assert news(run, run.version)["rows"] == []
    for since in ("", "-", "x-1e9", "-²"):
        assert len(news(run, since)["rows"]) == 3
    assert news(run, "-" + "9" * 5000)["anew"]


def test_half_a_line_is_no_news(tmp_path: Path) -> None:
    run = Followed(written(tmp_path / "run", whole_run()[:4]), "run", "./")
    run.read()
    version, turn, text = run.version, run.turn, line(evaluated(2, 0.5))
    for part in (text[:20], text[20:-1]):
        with (tmp_path / "run" / LOG).open("a") as out:
            out.write(part)
        run.read()
        assert (run.version, run.turn) == (version, turn)
    with (tmp_path / "run" / LOG).open("a") as out:
        out.write("\n")
    run.read()
    assert run.version != version


def test_the_page_is_offered_anew_after_a_time_that_follows_its_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(followed.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(followed, "REFRESH", 2.0)
    log = whole_run()
    run = Followed(written(tmp_path / "run", log[:5]), "run", "./")
    before = run.page()
    more(tmp_path / "run", *log[5:8])
    assert news(run)["page"].endswith("-5")
    assert made_of(run.page()) == made_of(before) != run.version
    clock[0] += 60
    assert news(run)["page"] == made_of(run.page()) == run.version


def test_a_broken_line_is_said_until_it_is_mended(tmp_path: Path) -> None:
    log, said = whole_run(), list[str]()
    folder = written(tmp_path / "run", log[:5])
    more(folder)
    with (folder / LOG).open("a") as out:
        out.write('{"event": "<b>nonsense"}\n')
    run = Followed(folder, "run", "./")
    found = news(run)
    assert run.status
    assert run.status.state == "broken"
    assert f"{LOG}:6: is no event of llmevo" in run.status.reason
    assert 'role="alert"' in found["now"]
    assert "<b>" not in found["now"]
    assert "3 of 9" in found["now"]
    assert "Every candidate" in run.page().decode()  # the report of the lines before
    written(folder, log)
    news(run)
    assert run.status.state == "finished"
    assert said == []


def test_events_that_do_not_fit_are_a_broken_run(tmp_path: Path) -> None:
    run = Followed(written(tmp_path / "run", [started(), evaluated(7, 0.5)]), "run", "./")
    assert "candidate 7, which was never asked for" in news(run)["now"]


def test_a_log_that_cannot_be_read_now_is_read_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Followed(written(tmp_path / "run", whole_run()[:5]), "run", "./")
    with monkeypatch.context() as patch:
        patch.setattr(Followed, "_read", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
        assert "cannot be read (Permission denied)" in news(run)["now"]
    assert "3 of 9" in news(run)["now"]


def test_an_error_with_one_run_does_not_end_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    for name in ("a", "b"):
        written(tmp_path / name, whole_run())
    runs, real = Runs(tmp_path, said.append), Followed.read

    def read(run: Followed, wanted: bool = False) -> None:
        if run.name == "a":
            raise ZeroDivisionError("of a report")
        real(run, wanted)
        runs.closed.set()

    monkeypatch.setattr(Followed, "read", read)
    runs.follow()
    assert [line.partition(" ")[2] for line in said] == [
        f"{tmp_path}/a cannot be followed (ZeroDivisionError: of a report)"
    ]
    assert runs.runs[1].status


def test_a_deleted_run_is_said_and_comes_again(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", whole_run()[:5])
    run = Followed(folder, "run", "./")
    run.page()
    before, text = run.version, (folder / LOG).read_text()
    shutil.rmtree(folder)
    found = news(run, before)
    assert run.status
    assert run.status.state == "deleted"
    assert "was deleted or moved" in found["now"]
    assert not found["anew"]
    assert "was deleted or moved" in run.page().decode()
    turn = run.turn
    run.read()
    assert run.turn == turn  # it is said once
    folder.mkdir()
    (folder / LOG).write_text(text)
    assert "was deleted" not in news(run, before)["now"]


def test_another_run_in_its_place_is_shown_anew(tmp_path: Path) -> None:
    log = whole_run()
    folder = written(tmp_path / "run", log)
    run = Followed(folder, "run", "./")
    run.page()
    before = run.version
    written(folder, [started(budget=20), *log[1:4]])
    found = news(run, before)
    assert found["anew"]
    assert "2 of 20 evaluations" in found["now"]
    assert not news(run, run.version)["anew"]


def test_a_run_that_was_cut_is_shown_anew(tmp_path: Path) -> None:
    log = whole_run()
    folder = written(tmp_path / "run", log)
    run = Followed(folder, "run", "./")
    run.page()
    before = run.version
    written(folder, log[:4])
    news(run, before)
    more(folder, *log[4:6])  # the first look finds the cut, the next one reads it again
    assert news(run, before)["anew"]
    assert run.status
    assert run.status.state == "stopped"


def test_a_run_that_has_not_begun_says_so_and_then_begins(tmp_path: Path) -> None:
    folder, log = tmp_path / "run", whole_run()
    with RunLog(folder) as writer:
        run = Followed(folder, "run", "./")
        assert "The run has not begun" in run.page().decode()
        since = run.version
        for event in log[:4]:
            writer.append(event)
        found = news(run, since)
        assert "running" in found["now"]
        assert not found["anew"]
        until(lambda: news(run, since)["page"] == run.version)  # pages are made at a pace
        assert "Every candidate" in run.page().decode()


def test_what_nobody_watches_is_forgotten_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path / "run", whole_run())
    run = Followed(folder, "run", "./")
    run.read()
    version, status = run.version, run.status
    run.rest()
    assert run.version == "-0"
    run.read()
    assert (run.version, run.status) == ("-0", status)  # nothing is new
    assert "Every candidate" in run.page().decode()
    assert run.version == version
    run.rest()
    assert run.version == version  # its page was just asked for
    monkeypatch.setattr(followed, "KEPT", -1.0)
    run.rest()
    run.viewers = 1
    assert len(news(run)["rows"]) == 9


def test_a_thought_and_the_latest_candidates_are_above_the_report(tmp_path: Path) -> None:
    log = whole_run()
    run = Followed(written(tmp_path / "run", log[:11]), "run", "./")
    now = news(run)["now"]
    assert "Words want more of two." in now
    latest = now.partition("<ul")[2]
    assert latest.index("#5") < latest.index("#4") < latest.index("#3")
    assert "failed: the merge is not finite" in latest


def test_hypotheses_are_shown_with_what_the_scores_say(tmp_path: Path) -> None:
    (tmp_path / LOG).write_bytes(REAL.read_bytes())
    found = {claim.text: claim for analysis in analyses(Subject.of(tmp_path)) for claim in analysis.claims}
    assert len(found) > 20
    lifted = found["restoring words lifts #11"]
    assert (lifted.word, lifted.better, lifted.worse, lifted.task) == ("supported", 14, 11, "words")
    assert lifted.effect
    assert lifted.effect.mean > lifted.effect.stderr
    assert found["#24's direction goes on"].word == "open"
    page = Followed(tmp_path, "run", "./").page().decode()
    assert '<strong class="supported">supported</strong>: restoring words lifts #11' in page


# A folder


def test_new_runs_of_a_folder_are_found_and_a_broken_one_is_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    folder, made = tmp_path / "served", tmp_path / "made"
    folder.mkdir()
    written(made / "sweep" / "a <i>", whole_run())
    written(made / "b", whole_run()[:5])
    (made / "c").mkdir()
    (made / "c" / LOG).write_text("nonsense\n")
    runs = Runs(folder, said.append)
    assert "There is no run yet" in runs.page().decode()
    thread = threading.Thread(target=runs.follow, daemon=True)
    with runs.watching(None):
        thread.start()
        stream = (json.loads(text) for _, text in runs.news(None, "", 20) if text)
        for name in ("sweep", "b", "c"):
            (made / name).rename(folder / name)  # whole: a log that is being written may be broken for a moment
        found = next(each["list"] for each in stream if each["list"].count("<strong") == 3)
        assert "sweep/a &lt;i&gt;" in found
        assert 'href="runs/sweep%2Fa%20%3Ci%3E/"' in found
        assert found.count('type="checkbox"') == 1
        (folder / "b").rename(made / "b")
        next(each for each in stream if '"deleted"' in each["list"])
    runs.close()
    thread.join()
    assert len(said) == 2
    assert f"{LOG}:1: is no event of llmevo" in said[0]
    assert "was deleted or moved" in said[1]


def test_a_run_that_begins_in_the_served_folder_itself_has_its_page(tmp_path: Path) -> None:
    with served(tmp_path) as at:
        written(tmp_path, whole_run())
        at.runs.discover()
        assert asked(at, f"/runs/{tmp_path.name}/")[0].status == 200


def test_only_places_that_exist_are_served(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such run or folder"):
        Runs(tmp_path / "nowhere", print)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="is a file"):
        Runs(tmp_path / "file", print)


def test_the_folder_of_runs_may_be_made_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = Runs(Path("runs"), print)
    assert not runs.runs
    written(tmp_path / "runs/config", whole_run()[:3])
    assert runs.discover()
    assert [run.name for run in runs.runs] == ["config"]


# The server


def test_a_page_may_load_nothing_and_is_not_kept(tmp_path: Path) -> None:
    with served(written(tmp_path / "run", whole_run())) as at:
        answer, text = asked(at, "/")
        rules = dict(
            rule.strip().split(" ", 1) for rule in (answer.getheader("Content-Security-Policy") or "").split(";")
        )
        assert rules["default-src"] == rules["base-uri"] == rules["frame-ancestors"] == "'none'"
        assert (rules["connect-src"], rules["form-action"]) == ("'self'", "'self'")
        assert all(part.startswith("'sha256-") for part in rules["script-src"].split())
        assert answer.getheader("Cache-Control") == "no-store"
        assert answer.getheader("X-Content-Type-Options") == "nosniff"
        assert answer.getheader("Access-Control-Allow-Origin") is None
        assert "Python" not in (answer.getheader("Server") or "")
        assert "Every candidate" in text
        head, nothing = asked(at, "/", "HEAD")
        assert (head.status, nothing) == (200, "")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_nothing_can_be_sent(tmp_path: Path, method: str) -> None:
    with served(written(tmp_path / "run", whole_run())) as at:
        assert asked(at, "/", method)[0].status == 501


@pytest.mark.parametrize(
    "path",
    [
        "/config.yml",
        "/../run/config.yml",
        "/runs/..%2F..%2Fetc/",
        "/runs/%2Fetc/",
        "/runs/run/config.yml",
        "//x/",
        "/compare",
    ],
)
def test_no_file_is_reached_by_its_path(tmp_path: Path, path: str) -> None:
    (written(tmp_path / "run", whole_run()) / "config.yml").write_text("secret: sk-1\n")
    with served(tmp_path / "run") as at:
        answer, text = asked(at, path)
        assert answer.status == 404
        assert "sk-1" not in text


def test_a_foreign_name_is_refused(tmp_path: Path) -> None:
    with served(written(tmp_path / "run", whole_run())) as at:
        for host in (
            "evil.example",
            f"evil.example:{at.server_port}",
            "localhost.evil.example",
            "",
            "[",
            "127.0.0.1.x",
        ):
            answer, text = asked(at, "/", Host=host)
            assert (answer.status, "Every candidate" in text) == (421, False), host
        for host in ("localhost", "LOCALHOST:9000", "127.0.0.1:1", "[::1]:8420"):
            assert asked(at, "/", Host=host)[0].status == 200, host
    assert Access.of("127.0.0.1", ["Box.example"]).admits("box.example:8420")
    for name in ("box.example:8420", "http://box.example"):
        with pytest.raises(UserError, match=f"--allow-host {name}: give the name of a machine alone"):
            Access.of("127.0.0.1", [name])


def test_what_is_no_address_has_an_answer_and_no_word_in_the_terminal(tmp_path: Path) -> None:
    said: list[str] = []
    with (
        served(written(tmp_path / "run", whole_run()), said=said) as at,
        socket.create_connection(("127.0.0.1", at.server_port), timeout=20) as link,
    ):
        link.sendall(b"GET http://[bad/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert link.recv(20).startswith(b"HTTP/1.1 400")
    assert said == []


def test_other_machines_need_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(written(tmp_path / "run", whole_run()), host="0.0.0.0") as at:
        token = at.access.token
        assert len(token) >= 32
        assert f"?token={token}" in at.url
        for path, headers, said in (
            ("/", {}, "is missing"),
            ("/events", {}, "is missing"),
            ("/plotly.js", {}, "is missing"),
            ("/?token=wrong", {}, "is wrong"),
            (f"/?token={token}x", {}, "is wrong"),
            ("/", {"Authorization": "Bearer wrong"}, "is wrong"),
            ("/", {"Cookie": f"llmevo-{at.server_port}=wrong"}, "is missing"),
            ("/", {"Cookie": '"[];=?'}, "is missing"),
        ):
            answer, text = asked(at, path, **headers)
            assert (answer.status, said in text) == (401, True), path
            assert token not in text
        answer, _ = asked(at, f"//evil.example/?token={token}&run=a")
        assert (answer.status, answer.getheader("Location")) == (303, "/evil.example/?run=a")
        cookie = answer.getheader("Set-Cookie") or ""
        assert "HttpOnly; SameSite=Strict" in cookie
        assert asked(at, f"/\\evil.example/?token={token}")[0].getheader("Location") == "/evil.example/"
        kept = cookie.partition(";")[0]  # other services of the host may have set cookies that are no cookies
        foreign = [
            {"Cookie": f"{other}; {kept}; z=1"} for other in ('prefs={"a":1}', "theme=dark mode", 'x="un', "name=Jörg")
        ]
        for headers in ({"Cookie": kept}, {"Authorization": f"Bearer {token}"}, *foreign):
            answer, text = asked(at, "/", **headers)
            assert (answer.status, "Every candidate" in text, token in text) == (200, True, False)
    monkeypatch.setenv(TOKEN, "short")
    with pytest.raises(UserError, match=TOKEN):
        Access.of("127.0.0.1")
    monkeypatch.setenv(TOKEN, "correct horse battery staple")  # a cookie would end at the space
    with pytest.raises(UserError, match="letters, digits"):
        Access.of("127.0.0.1")
    monkeypatch.setenv(TOKEN, "one-of-my-own-that-is-long")
    assert Access.of("127.0.0.1").token == "one-of-my-own-that-is-long"  # of other users of this machine
    monkeypatch.delenv(TOKEN)
    assert Access.of("127.0.0.1").token == ""


def test_only_loopback_addresses_need_no_token() -> None:
    assert [host for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost") if not is_loopback(host)] == []
    assert [
        host for host in ("0.0.0.0", "::", "", "192.168.0.2", "localhost.example", "8.8.8.8") if is_loopback(host)
    ] == []


def test_two_viewers_get_the_same_news(tmp_path: Path) -> None:
    log, folder = whole_run(), tmp_path / "run"
    with RunLog(folder) as writer:
        for event in log[:4]:
            writer.append(event)
        with served(folder) as at, stream(at, "/events") as one, stream(at, "/events") as other:
            first = next(one)
            assert first["version"].endswith("-4")
            assert [row["id"] for row in first["rows"]] == [0, 1, 2]
            assert next(other)["version"] == first["version"]
            writer.append(log[4])
            assert next(one)["rows"] == next(other)["rows"] != []
            with stream(at, "/events", **{"Last-Event-ID": first["version"]}) as again:
                assert [row["id"] for row in next(again)["rows"]] == [1, 2]


def test_so_many_pages_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MOST", 1)
    with served(written(tmp_path / "run", whole_run())) as at, stream(at, "/events") as one:
        next(one)
        assert asked(at, "/events")[0].status == 503
        assert asked(at, "/")[0].status == 200


def test_runs_are_compared_by_their_keys(tmp_path: Path) -> None:
    for name in ("a", "b"):
        written(tmp_path / name, whole_run())
    with served(tmp_path) as at:
        keys = [run.key for run in at.runs.runs]
        assert "tick two runs" in asked(at, "/compare")[1]
        assert "tick two runs" in asked(at, f"/compare?run={keys[0]}&run=../a")[1]
        answer, text = asked(at, f"/compare?run={keys[0]}&run={keys[1]}")
        assert answer.status == 200
        assert "two runs with seed 0" in text  # the reason for which these cannot be compared


# The command


def test_mistakes_are_one_line(workspace: Workspace) -> None:
    written(Path("run"), whole_run())
    with served(Path("run")) as at:
        status, said = workspace.llmevo("serve", "run", "--port", at.server_port)
    assert (status, said.count("\n")) == (2, 1)
    assert f"--port: {at.server_port} is in use" in said
    for words, named in ((("nowhere",), "nowhere"), (("run", "--host", "192.0.2.1"), "--host: 192.0.2.1")):
        status, said = workspace.llmevo("serve", *words)
        assert (status, named in said, said.count("\n")) == (2, True, 1)


def test_the_command_serves_until_ctrl_c(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", whole_run()[:6])
    # The shell that runs the tests may have them ignore the signal.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code += "; from llmevo.cli.app import main; main()"
    command = [sys.executable, "-c", code, "serve", str(folder), "--port", "0"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert running.stdout
    shown = running.stdout.readline()
    assert f"{folder} is shown at http://127.0.0.1:" in shown
    shutil.rmtree(folder)
    assert "was deleted or moved" in running.stdout.readline()
    running.send_signal(signal.SIGINT)
    left, _ = running.communicate(timeout=30)
    # The signal may come between a line and its removal from the console's buffer: then the line is printed again.
    assert (running.returncode, left.splitlines()[-1]) == (130, "No longer shown; the runs are left as they are.")
    assert "Traceback" not in left
