"""The Pareto front in the report: its drawing, its hypervolume and its candidates."""

import json
import re
from io import StringIO
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from llmevo.evaluation.score import Score
from llmevo.reports.html.analysis import Subject
from llmevo.reports.html.page import report
from llmevo.reports.html.pareto import Covered, covered, front, hypervolume, places
from llmevo.reports.terminal import panel
from llmevo.run.log import events
from llmevo.workers.protocol import Result
from support import made_logs

NAMES = ("q_words_search", "q_family_search", "q_sums_search")


def log(*scores: tuple[float, ...]) -> list[Any]:
    tasks = NAMES[: len(scores[0])]
    begun = made_logs.started(tasks=tasks)
    begun.config["search"]["objective"] = "pareto"
    rows: list[Any] = [
        begun,
        made_logs.asked(0, [0, 1], "parent", ("one", "two")),
        made_logs.asked(1, [*range(2, len(scores))]),
    ]
    for place, values in enumerate(scores):
        metrics = {t: {"acc,none": v, "acc_stderr,none": 0.05} for t, v in zip(tasks, values, strict=True)}
        found = Score(sum(values), 0.05, metrics, 10)
        rows.append(events.Evaluated(candidate=place, **events.scored(Result(place, found, seconds={"merge": 1.0}))))
    return [*rows, made_logs.told(0), made_logs.told(1)]


@pytest.mark.parametrize("width", [2, 3])
def test_the_report_draws_the_front_with_the_numbers_of_its_candidates(tmp_path: Path, width: int) -> None:
    points = [(0.9, 0.1, 0.1), (0.1, 0.9, 0.1), (0.6, 0.7, 0.4), (0.5, 0.6, 0.3)]
    subject = Subject.of(made_logs.written(tmp_path / "run", log(*(point[:width] for point in points))))
    assert [(place.id, place.best) for place in places(subject)] == [(2, True), (0, False), (1, False)]
    # The start rows are as good as can be at one task each and cover nothing; at the third task both are equal.
    found = covered(subject)
    assert found == (Covered(0.0, found.front) if found else None)
    assert (found.front if found else None) == (pytest.approx(0.625 * 0.75) if width == 2 else None)
    figure = front(subject)
    assert figure is not None
    shown = json.dumps(figure)
    assert all(f"#{number}" in shown for number in (0, 1, 2))
    names = [trace["name"] for trace in figure["data"]]
    assert names == (["not on the front", "front"] if width == 2 else ["#2 (best)", "#0", "#1"])


def test_sizes_are_columns_of_the_front_beside_the_tasks(tmp_path: Path) -> None:
    rows = log((0.9, 0.1), (0.1, 0.9), (0.6, 0.7))
    rows[0].config["search"]["sizes"] = ["layers", "parameters"]
    numbers = {"layer_parameters": [3_000_000, 4_000_000], "other_parameters": 500_000}
    rows[0] = rows[0].model_copy(update=numbers)
    subject = Subject.of(made_logs.written(tmp_path / "run", rows))
    page = re.sub(r"\s+", " ", report(subject))
    table = page[page.index("The Pareto front") :]
    head, first = table[table.index("<thead>") : table.index("</thead>")], table[table.index('class="best"') :]
    assert [cell in head for cell in ("layers", "parameters")] == [True, True]
    assert [cell.split("<")[0] for cell in first.split("<td>")[1:6]] == ["0.600", "0.700", "2", "7.5 M", "numeric"]
    console = Console(width=120, file=StringIO(), record=True)
    console.print(panel.front(subject.state, 120))
    assert "7.5 M" in console.export_text()


def test_the_hypervolume_is_that_of_monte_carlo_and_what_misses_a_constraint_covers_nothing(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    points = [(0.0, 0.0, 0.0), (0.5, 0.25, 1.0), *(tuple(point) for point in draw.uniform(0, 1, (8, 3)).round(3))]
    found = covered(Subject.of(made_logs.written(tmp_path / "run", log(*points))))
    assert found
    samples = draw.uniform(0, 1, (200_000, 3))
    reached = np.zeros(len(samples), dtype=bool)
    for point in points:
        reached |= (samples <= point).all(axis=1)
    assert found.front * 0.5 * 0.25 * 1.0 == pytest.approx(reached.mean(), abs=0.005)
    assert found.start == pytest.approx(1.0)
    kept = log(*points)
    kept[0].config["constraints"] = [f"{NAMES[2]} >= 2"]
    assert covered(Subject.of(made_logs.written(tmp_path / "none", kept))) is None


def test_a_hypervolume_is_that_of_the_boxes_worked_out_by_hand() -> None:
    assert hypervolume(np.zeros((0, 2))) == 0
    assert hypervolume(np.array([[2.0, 3.0], [1.0, 1.0], [2.0, 3.0], [-1.0, 9.0]])) == 6
    assert hypervolume(np.array([[3.0, 1.0], [1.0, 3.0], [2.0, 2.0]])) == 6
    assert hypervolume(np.array([[2.0, 1.0, 1.0], [1.0, 2.0, 1.0], [1.0, 1.0, 2.0]])) == 4


@pytest.mark.parametrize("tasks", [2, 3, 4])
def test_a_hypervolume_is_that_of_inclusion_and_exclusion(tasks: int) -> None:
    points = np.random.default_rng(tasks).uniform(0, 1, (7, tasks)).round(1)  # with ties
    boxes = [points[[*chosen]].min(axis=0).prod() for n in range(1, 8) for chosen in combinations(range(7), n)]
    signs = [(-1) ** (n + 1) for n in range(1, 8) for _ in combinations(range(7), n)]
    assert hypervolume(points) == pytest.approx(np.dot(boxes, signs))


def test_a_prediction_of_one_emphasis_is_not_shown_with_the_front(tmp_path: Path) -> None:
    rows = log((0.9, 0.1), (0.1, 0.9), (0.6, 0.7))
    rows[2].candidates[0]["note"] = "expected 0.8171"
    assert [place.note for place in places(Subject.of(made_logs.written(tmp_path / "run", rows)))] == ["", "one", "two"]
