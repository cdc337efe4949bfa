"""Logs made by hand, for what reads them: no model, no engine."""

from pathlib import Path
from typing import Any

from llmevo.run.log import events
from llmevo.run.log.state import RunState

TASKS = ("q_words_search", "q_family_search")


def started(budget: Any = 9, tasks: tuple[str, ...] = TASKS, **changes: Any) -> events.RunStarted:
    """The first event of a run over two models."""
    config = {
        "genome": {"models": ["one", "two"], "merge_method": "linear"},
        "tasks": [{"name": name} for name in tasks],
        "heldout": [{"name": name.replace("search", "heldout")} for name in tasks],
        "search": {"optimizer": "llm", "budget": budget},
        **changes,
    }
    return events.RunStarted(
        config=config,
        root="/",
        prompts={},
        versions={"llmevo": "0.1.0"},
        sources=[{"reference": name, "revision": None, "checksum": "ab", "licence": None} for name in ("one", "two")],
        seed=0,
        genes=[{"name": "one/all/weight", "low": 0.0, "high": 1.0}],
        layers=2,
        items=10,
        heldout_items=20,
        proposer="local",
        style="chat",
    )


def asked(generation: int, places: list[int], origin: str = "gaussian", notes: tuple[str, ...] = ()) -> events.Asked:
    rows: list[dict[str, Any]] = []
    for place, note in zip(places, [*notes, *[""] * len(places)], strict=False):
        weights = {"one": 0.5, "two": round(place / 100, 2)}
        models = [{"model": name, "parameters": {"weight": weight}} for name, weight in weights.items()]
        recipe = {"merge_method": "linear", "models": models}
        rows.append({"id": place, "origin": origin, "genes": {"one/all/weight": 0.5}, "recipe": recipe, "note": note})
    return events.Asked(generation=generation, candidates=rows)


def evaluated(place: int, score: float, tasks: tuple[str, ...] = TASKS) -> events.Evaluated:
    values = {name: {"acc,none": score, "acc_stderr,none": 0.1} for name in tasks}
    seconds = {"merge": 1.0, "evaluate": 2.0}
    return events.Evaluated(candidate=place, score=score, stderr=0.05, tasks=values, items=10, seconds=seconds)


def failed(place: int, reason: str = "the merge is not finite") -> events.Failed:
    return events.Failed(candidate=place, reason=reason, seconds={"evaluate": 1.0})


def told(generation: int, trust: float | None = 0.4) -> events.Told:
    return events.Told(generation=generation, state="ab", sigma=0.21, best=None, trust=trust)


def prompted(
    generation: int, analysis: str = "Words want more of two.", problems: tuple[str, ...] = ()
) -> events.Prompted:
    return events.Prompted(
        generation=generation,
        model="some-llm",
        style="chat",
        messages=[{"role": "user", "content": "What next?"}],
        reply="{}",
        tokens={"prompt": 100, "completion": 20},
        cost=0.01,
        seconds=1.5,
        problems=[*problems],
        analysis=analysis,
        used=2,
    )


def held_out(row: str, kind: str, score: float, stderr: float = 0.01, tasks: tuple[str, ...] = TASKS) -> events.HeldOut:
    values = {name.replace("search", "heldout"): {"acc,none": score} for name in tasks}
    return events.HeldOut(
        row=row,
        kind=kind,
        candidate=None,
        score=score,
        stderr=stderr,
        tasks=values,
        items=20,
        seconds={"evaluate": 1.0},
    )


def unscored(row: str, kind: str, reason: str = "the merge is not finite") -> events.Unscored:
    return events.Unscored(step="heldout", candidate=None, reason=reason, row=row, kind=kind)


def finished(best: int, score: float) -> events.RunFinished:
    return events.RunFinished(
        best=best, search_score=score, heldout=None, proposals={"prompts": 1, "answered": 1, "used": 1}
    )


def whole_run() -> list[events.Event]:
    """A finished run of nine candidates, one of them failed; #4 of the LLM is the best."""
    start = asked(0, [0, 1, 2], "parent", ("one", "two", "uniform"))
    log: list[events.Event] = [started(), start, *(evaluated(i, 0.3 + i / 20) for i in range(3)), told(0, None)]
    log += [prompted(1), asked(1, [3, 4, 5], "llm", ("", "more of two", "")), evaluated(3, 0.5), evaluated(4, 0.8)]
    log += [failed(5), told(1), asked(2, [6, 7, 8]), *(evaluated(i, 0.45) for i in range(6, 9)), told(2)]
    rows = (held_out("one", "parent", 0.3), held_out("two", "parent", 0.4), held_out("best", "best", 0.7))
    return [*log, *rows, finished(4, 0.8)]


def written(folder: Path, log: list[events.Event]) -> Path:
    """The folder with these events as its log."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "events.jsonl").write_text("".join(line(event) for event in log))
    return folder


def line(event: events.Event) -> str:
    return event.model_dump_json(by_alias=True) + "\n"


def folded(log: list[events.Event]) -> RunState:
    return RunState.fold(iter(log))
