"""The run folder: what survives a crash, and who may write."""

import errno
import json
import shutil
from pathlib import Path

import pytest

from llmevo.errors import LogError, RunError
from llmevo.run.log import events
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import LOG, RunLog, read_log

GENES = {"a/all/weight": 0.3}


def asked(*places: int, origin: str = "llm") -> events.Asked:
    rows = [{"id": i, "origin": origin, "genes": GENES, "recipe": {"place": i}, "note": "é\u2028"} for i in places]
    return events.Asked(generation=1, candidates=rows)


def evaluated(place: int, score: float) -> events.Evaluated:
    return events.Evaluated(candidate=place, score=score, stderr=0.0, tasks={}, items=5, seconds={})


def told(generation: int) -> events.Told:
    return events.Told(generation=generation, state="ab", sigma=0.1, best=None)


def written(folder: Path, *log: events.Event) -> bytes:
    with RunLog(folder) as run:
        for event in log:
            run.append(event)
    return (folder / LOG).read_bytes()


def test_what_is_appended_is_on_disk_at_once_and_is_read_back(tmp_path: Path) -> None:
    log: list[events.Event] = [asked(0, 1), evaluated(0, 0.5), told(1)]
    with RunLog(tmp_path / "deep" / "run") as run:
        for place, event in enumerate(log, start=1):
            run.append(event)
            assert read_log(run.folder) == log[:place]
    assert read_log(tmp_path / "deep" / "run" / LOG) == log


def test_a_resumed_log_gives_its_events_and_goes_on_after_them(tmp_path: Path) -> None:
    before = written(tmp_path, asked(0), told(1))
    with RunLog(tmp_path, resume=True) as run:
        assert run.recorded == read_log(tmp_path)
        run.append(told(2))
    after = (tmp_path / LOG).read_bytes()
    assert after.startswith(before)
    assert after.count(b"\n") == 3


def test_a_torn_last_line_is_cut_at_whatever_byte_it_was_torn(tmp_path: Path) -> None:
    first = written(tmp_path, asked(0))
    with RunLog(tmp_path, resume=True) as run:
        run.append(asked(1))
    whole = (tmp_path / LOG).read_bytes()
    for end in range(len(first), len(whole)):
        (tmp_path / LOG).write_bytes(whole[:end])
        with RunLog(tmp_path, resume=True) as run:
            assert len(run.recorded) == 1, end
            assert (tmp_path / LOG).read_bytes() == first, end
            run.append(told(2))
        assert [event.event for event in read_log(tmp_path)] == ["asked", "told"], end


def test_a_log_torn_in_its_first_line_is_an_empty_one(tmp_path: Path) -> None:
    whole = written(tmp_path, told(1))
    (tmp_path / LOG).write_bytes(whole[:20])
    with RunLog(tmp_path, resume=True) as run:
        assert run.recorded == []
        run.append(told(1))
    assert len(read_log(tmp_path)) == 1


def test_a_reader_leaves_a_line_that_is_still_being_written_alone(tmp_path: Path) -> None:
    torn = written(tmp_path, told(1)) + b'{"event": "to'
    (tmp_path / LOG).write_bytes(torn)
    assert len(read_log(tmp_path)) == 1
    assert (tmp_path / LOG).read_bytes() == torn


@pytest.mark.parametrize(
    "line",
    ["not JSON", '{"event": "celebrated"}', "[]", "3", '{"event": "told"}', '{"schema": NaN}', '{"schema": "new"}', ""],
)
def test_a_line_that_is_no_event_is_refused_with_its_number(tmp_path: Path, line: str) -> None:
    whole = written(tmp_path, told(1))
    (tmp_path / LOG).write_bytes(whole + line.encode() + b"\n" + whole)
    with pytest.raises(RunError, match=rf"{LOG}:2"):
        read_log(tmp_path)
    with pytest.raises(RunError, match=rf"{LOG}:2"):
        RunLog(tmp_path, resume=True)


def test_a_log_that_could_not_be_read_is_free_again(tmp_path: Path) -> None:
    whole = written(tmp_path, told(1))
    (tmp_path / LOG).write_bytes(whole + b"{}\n")
    with pytest.raises(RunError):
        RunLog(tmp_path, resume=True)
    (tmp_path / LOG).write_bytes(whole)
    with RunLog(tmp_path, resume=True) as run:
        assert len(run.recorded) == 1


def test_a_log_of_a_newer_schema_is_refused_with_the_way_out(tmp_path: Path) -> None:
    raw = {**json.loads(written(tmp_path, told(1))), "schema": events.SCHEMA + 1, "state": {"new": "shape"}}
    (tmp_path / LOG).write_text(json.dumps(raw) + "\n")
    for opening in (read_log, lambda folder: RunLog(folder, resume=True)):
        with pytest.raises(RunError, match=r"newer llmevo.*update"):
            opening(tmp_path)


def test_a_second_writer_is_refused_until_the_first_is_done(tmp_path: Path) -> None:
    with RunLog(tmp_path) as run:
        run.append(told(1))
        with pytest.raises(RunError, match="another process"):
            RunLog(tmp_path, resume=True)
        run.append(told(2))
    with RunLog(tmp_path, resume=True) as again:
        assert len(again.recorded) == 2


def test_a_file_system_without_locks_is_not_taken_for_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(RunError, match=r"cannot be locked .*No locks available.*another disk"):
        RunLog(tmp_path)


@pytest.mark.parametrize("name", ["config.yml", "best.yml"])
def test_a_folder_with_files_of_the_users_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(RunError, match=rf"{name} that a run would overwrite; choose another --out"):
        RunLog(tmp_path)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {name: "mine"}


def test_a_log_that_is_deleted_or_moved_during_the_run_is_missed_before_more_is_written(tmp_path: Path) -> None:
    with RunLog(tmp_path / "run") as run:
        run.append(told(1))
        (tmp_path / "run").rename(tmp_path / "moved")
        for write in (lambda: run.append(told(2)), lambda: run.write("best.yml", "text")):
            with pytest.raises(LogError, match=r"was moved while the run went on\. Nothing that was scored is lost"):
                write()
        shutil.rmtree(tmp_path / "moved")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / LOG).write_text("another")
        with pytest.raises(LogError, match="was deleted while the run went on, and all that it held is lost"):
            run.append(told(2))
    assert [file.name for file in (tmp_path / "run").iterdir()] == [LOG]


def test_a_run_is_written_to_its_folder_though_the_working_directory_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with RunLog(Path("run")) as run:
        monkeypatch.chdir(tmp_path / "elsewhere")
        run.append(told(1))
        run.write("best.yml", "text")
    assert {file.name for file in (tmp_path / "run").iterdir()} == {LOG, "best.yml"}
    assert [*(tmp_path / "elsewhere").iterdir()] == []


def test_a_folder_that_cannot_be_made_holds_no_run_to_go_on_with(tmp_path: Path) -> None:
    with pytest.raises(LogError, match=r"No run was begun; .*, or make this one writable") as caught:
        RunLog(tmp_path / ("x" * 300))
    assert "resume" not in str(caught.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"is no place for a run: .*file is a file; choose another --out"):
        RunLog(tmp_path / "file" / "run")


def test_a_folder_that_holds_a_run_is_refused_unless_it_is_resumed(tmp_path: Path) -> None:
    before = written(tmp_path, told(1))
    with pytest.raises(RunError, match="llmevo resume"):
        RunLog(tmp_path)
    assert (tmp_path / LOG).read_bytes() == before


def test_a_folder_without_a_run_cannot_be_resumed_or_read(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="llmevo run"):
        RunLog(tmp_path / "none", resume=True)
    with pytest.raises(RunError, match="holds no run"):
        read_log(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_file_beside_the_log_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunLog(tmp_path) as run:
        run.write("best.yml", "old")
        run.write("best.yml", "new ü")
        assert (tmp_path / "best.yml").read_text(encoding="utf-8") == "new ü"

        def crash(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("os.fsync", crash)
        with pytest.raises(KeyboardInterrupt):
            run.write("best.yml", "half")
        assert (tmp_path / "best.yml").read_text(encoding="utf-8") == "new ü"


def test_files_beside_the_log_leave_no_leftovers(tmp_path: Path) -> None:
    with RunLog(tmp_path) as run:
        run.write("best.yml", "text")
    assert {file.name for file in tmp_path.iterdir()} == {LOG, "best.yml"}


def test_the_fold_of_a_log_knows_trials_candidates_and_the_best() -> None:
    failed = events.Failed(candidate=3, reason="NaN", seconds={})
    rows = [asked(0, 1, origin="parent"), evaluated(0, 0.4), evaluated(1, 0.6), told(0)]
    more = [asked(2, 3, 4), evaluated(2, 0.9), failed, evaluated(4, 0.9), told(1)]
    state = RunState.fold(iter([*rows, *more]))
    assert [*state.candidates] == [*state.trials] == [0, 1, 2, 3, 4]
    assert state.recipes[3] == {"place": 3}
    assert (state.trials[3].score, state.trials[3].reason) == (None, "NaN")
    assert state.best is state.trials[2]  # the earlier one of equals
    assert state.best_parent is state.trials[1]
    assert [event.generation for event in state.told] == [0, 1]
    assert state.finished is None


def test_the_fold_of_a_log_without_a_score_has_no_best() -> None:
    state = RunState.fold(iter([asked(0), events.Failed(candidate=0, reason="NaN", seconds={})]))
    assert state.best is None
    assert state.best_parent is None
    assert RunState.fold(iter([])).trials == {}


def test_the_fold_keeps_the_held_out_rows_and_the_end() -> None:
    row = events.HeldOut(row="base", kind="base", candidate=None, score=0.1, stderr=0.0, tasks={}, items=1, seconds={})
    end = events.RunFinished(best=None, search_score=None, heldout=None, proposals={})
    state = RunState.fold(iter([row, end]))
    assert state.heldout == {"base": row}
    assert state.finished is end
