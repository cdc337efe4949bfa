"""A person's votes: who is asked what, what strengths follow from it, and that nobody is asked twice."""

import io
import math
import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llmevo.cli import terminal
from llmevo.cli.voting import booth
from llmevo.config import parse_config, read_config
from llmevo.engines.scoring.hf import HfScorer
from llmevo.errors import TaskError
from llmevo.evaluation.evaluator import Evaluator
from llmevo.evaluation.judges.bradley_terry import PRIOR, preference, strengths
from llmevo.evaluation.judges.verdicts import Poll, Presentation, ShownPair, VerdictMemory, Vote
from llmevo.evaluation.tasks.task import AskingOptions, Task
from llmevo.reports.terminal.panel import picture
from llmevo.run.log import events
from llmevo.run.progress import votes_at_most
from support.tiny_model import tiny_llama, tiny_tokenizer
from support.workspace import Workspace

# Strengths


def test_one_vote_gives_finite_strengths_at_the_posteriors_maximum() -> None:
    theta, _ = strengths(2, [(0, 1, 1.0)])
    assert theta[0] == pytest.approx(-theta[1])
    # There the prior's slope and the vote's are equal.
    assert theta[0] / PRIOR**2 == pytest.approx(1 / (1 + math.exp(2 * theta[0])))


def test_many_votes_give_the_share_that_was_won_and_ties_count_half() -> None:
    games = [(0, 1, 1.0)] * 600 + [(1, 0, 1.0)] * 200 + [(0, 1, 0.5)] * 200
    chance, error = preference(*strengths(2, games), 0, 1)
    assert chance == pytest.approx(0.7, abs=0.002)
    assert error == pytest.approx(math.sqrt(0.7 * 0.3 / 1000), rel=0.02)
    assert strengths(2, [(1, 0, 0.0)] * 3)[0].tolist() == pytest.approx(strengths(2, [(0, 1, 1.0)] * 3)[0].tolist())


def test_strengths_reach_players_that_never_met() -> None:
    theta, covariance = strengths(3, [(0, 1, 1.0)] * 5 + [(1, 2, 1.0)] * 5)
    assert theta[0] > theta[1] > theta[2]
    assert preference(theta, covariance, 0, 2)[0] > preference(theta, covariance, 0, 1)[0] > 0.5
    nobody, _ = strengths(3, [])
    assert nobody.tolist() == [0, 0, 0]


def test_strengths_of_simulated_voters_are_found_again() -> None:
    draw, truth = random.Random(1), [1.0, 0.3, -0.2, -1.1]
    pairs = [draw.sample(range(4), 2) for _ in range(4000)]
    games = [(i, j, float(draw.random() < 1 / (1 + math.exp(truth[j] - truth[i])))) for i, j in pairs]
    theta, covariance = strengths(4, games)
    for j in range(1, 4):
        chance, error = preference(theta, covariance, j, 0)
        assert abs(chance - 1 / (1 + math.exp(truth[0] - truth[j]))) < 4 * error < 0.1


# Polls


def poll(*replies: list[str]) -> Poll:
    made = Poll()
    for place, some in enumerate(replies):
        made.present(Presentation(task="t", poll="p", player=f"p{place}", replies=some))
    return made


def vote(player: str, other: str, choice: Any, prompt: int = 0) -> Vote:
    return Vote(task="t", poll="p", player=player, other=other, prompt=prompt, choice=choice)


def test_a_candidate_meets_the_best_first_and_on_prompts_where_they_differ() -> None:
    three = poll(["a", "same"], ["b", "same"], ["c", "same"], ["d", "same"])
    three.votes += [vote("p1", "p0", "own"), vote("p2", "p1", "other")]
    pairs = three.pairs("p3", 3, seed=1)
    assert pairs[0].other == "p1"
    assert {pair.other for pair in pairs} == {"p0", "p1", "p2"}
    assert {pair.prompt for pair in pairs} == {0}
    assert len(three.pairs("p3", 9, seed=1)) == 3  # no pair is shown twice
    assert three.pairs("p0", 3, seed=1) == []


def test_who_is_shown_first_is_drawn_and_follows_from_the_seed() -> None:
    two = poll([f"a{i}" for i in range(200)], [f"b{i}" for i in range(200)])
    pairs = two.pairs("p1", 200, seed=1)
    assert 60 < sum(pair.own_first for pair in pairs) < 140
    assert len({pair.prompt for pair in pairs}) == 200
    assert two.pairs("p1", 200, seed=1) == pairs
    assert two.pairs("p1", 200, seed=2) != pairs


def test_after_a_stop_the_rest_is_asked_whatever_was_voted_before_it() -> None:
    three = poll(["a", "x"], ["b", "y"], ["c", "z"])
    three.votes.append(vote("p1", "p0", "own"))
    pairs = three.pairs("p2", 3, seed=4)
    three.votes.append(vote("p2", "p1", "own", pairs[0].prompt))
    assert three.left("p2", 3, seed=4) == pairs[1:]
    three.votes.append(vote("p2", pairs[1].other, "skip", pairs[1].prompt))
    assert three.left("p2", 3, seed=4) == pairs[2:]


def test_a_score_is_measured_against_the_first_and_skipped_votes_say_nothing() -> None:
    two = poll(["a"], ["b"])
    assert two.score("p0") == (0.5, 0.0)
    assert two.score("p1")[0] == 0.5
    two.votes.append(vote("p1", "p0", "skip"))
    assert two.score("p1")[0] == 0.5
    two.votes.append(vote("p1", "p0", "own"))
    once, error = two.score("p1")
    assert 0.5 < once < 1
    two.votes += [vote("p1", "p0", "own")] * 5
    assert two.score("p1")[0] > once
    assert two.score("p1")[1] < error
    assert two.score("p0") == (0.5, 0.0)


# The booth


SHOWING = ShownPair("taste", "Say [bold]hello[/bold].", "Hello!", "", 2)


@pytest.mark.parametrize(("keys", "choice"), [("xa", "first"), ("B", "second"), ("t", "tie"), ("1s", "skip")])
def test_a_key_is_a_vote_and_other_keys_are_none(keys: str, choice: str) -> None:
    pressed, console = iter(keys), Console(file=io.StringIO(), record=True, width=100)
    assert booth(console, lambda: next(pressed), nullcontext)(SHOWING) == choice
    text = console.export_text()
    assert all(words in text for words in ("taste: 2 to vote on", "Say [bold]hello[/bold].", "Hello!", "(nothing)"))
    assert text.index("Hello!") < text.index("(nothing)")
    assert next(pressed, None) is None


@pytest.mark.parametrize("key", ["q", "\x04"])
def test_one_may_stop(key: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        booth(Console(file=io.StringIO()), lambda: key, nullcontext)(SHOWING)


def gone() -> str:
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize("key", [gone, lambda: None], ids=["lost", "closed"])  # click gives None then
def test_a_terminal_that_is_gone_stops_the_run_and_fails_nobody(key: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        booth(Console(file=io.StringIO()), key, nullcontext)(SHOWING)


# The task


def taste(**votes: Any) -> Task:
    options = {"pairs": 2, "reply_tokens": 4, **votes}
    return Task.model_validate({"name": "taste", "prompts": "prompts.txt", "votes": options})


@pytest.fixture(scope="module")
def lms() -> list[HfScorer]:
    return [HfScorer(tiny_llama(seed), tiny_tokenizer()) for seed in range(3)]


def test_candidates_are_scored_by_votes(tmp_path: Path, lms: list[HfScorer]) -> None:
    (tmp_path / "prompts.txt").write_text("One.\nTwo.\nThree.\n")
    book = VerdictMemory()
    scoring = Evaluator([taste()], AskingOptions(apply_chat_template=False, blocks=3), root=tmp_path, verdicts=book)
    assert not scoring.raceable
    shown: list[ShownPair] = []

    def likes_the_later(showing: ShownPair) -> Any:
        shown.append(showing)
        old, new = next(iter(book.polls.values())).replies.values()
        place = ["One.", "Two.", "Three."].index(showing.prompt)
        assert {showing.first, showing.second} == {old[place], new[place]}
        return "first" if showing.first == new[place] else "second"

    first = scoring.score(lms[0])
    assert (first.total, first.stderr, first.item_scores, first.items) == (0.5, 0.0, {}, 3)
    with pytest.raises(TaskError, match="taste is voted on by a person, and there is no terminal"):
        scoring.score(lms[1])
    book.ask_voter = likes_the_later
    second = scoring.score(lms[1])
    assert len(shown) == 2
    assert second.total == second.tasks["taste"]["votes,none"] == book.standing("taste")
    assert second.total > 0.6
    assert second.stderr > 0
    assert scoring.score(lms[1]) == second  # who replies alike is the same player
    assert len(shown) == 2


# A run


def test_votes_are_foretold_of_every_set_of_questions() -> None:
    """Pairs of each but the first: of six candidates, of three finalists, best parent and uniform, of five rows."""
    voted = {"name": "taste", "prompts": "prompts.txt", "votes": {"pairs": 2}}
    raw = {
        "genome": {"models": ["one", "two"], "merge_method": "linear"},
        "tasks": [voted, "letters"],
        "heldout": [{**voted, "votes": {"pairs": 3}}],
        "search": {"finalists": 3},
    }
    config, origins = parse_config(raw, "config.yml"), ["uniform", "parent", "parent"]
    assert votes_at_most(config, candidates=6, origins=origins, selected=True) == 2 * (5 + 4) + 3 * 4
    assert votes_at_most(config, candidates=6, origins=origins, selected=False) == 2 * 5 + 3 * 4
    origins = ["uniform", "coefficient", "coefficient", "parent", "parent"]  # the best of the coefficients
    assert votes_at_most(config, candidates=8, origins=origins, selected=True) == 2 * (7 + 5) + 3 * 5


def run(workspace: Workspace, keys: list[str], *words: object) -> tuple[int, str]:
    """The command line in a terminal where these keys are pressed."""
    workspace.monkeypatch.setattr(terminal, "console", Console(width=120, height=40, force_terminal=True))
    workspace.monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    workspace.monkeypatch.setattr("typer.getchar", lambda: keys.pop(0))
    return workspace.llmevo(*words)


def test_a_run_that_was_left_goes_on_at_the_same_pair_and_can_be_recomputed(workspace: Workspace) -> None:
    (workspace.root / "prompts.txt").write_text("One.\nTwo.\nThree.\n")
    task = {"name": "taste", "prompts": "prompts.txt", "votes": {"pairs": 2, "reply_tokens": 4}}
    config = workspace.config(
        tasks=["letters", task],
        heldout=None,
        search={"optimizer": "random", "budget": 6, "population": 3, "seed": 3},
        engine={"self_check": False},
    )
    status, printed = workspace.llmevo("run", config, "--out", "run")
    assert (status, "taste is voted on by a person and needs a terminal" in printed) == (2, True), printed
    assert not (workspace.root / "run").exists()
    status, printed = workspace.llmevo("run", config, "--dry-run")
    assert (status, "You are asked for up to 10 votes" in printed) == (0, True), printed
    status, printed = run(workspace, ["a", "b", "a", "q"], "run", config, "--out", "run")
    assert (status, "llmevo resume run" in printed) == (130, True), printed
    before = [event for event in workspace.events("run") if isinstance(event, events.Voted)]
    assert len(before) == 3
    shown = Console(file=io.StringIO(), record=True, width=100)
    shown.print(picture(workspace.state("run"), read_config(config), Path("run"), 100))
    assert "3 of at most 10 votes" in shown.export_text()
    written = (workspace.root / "run/events.jsonl").read_bytes()
    workspace.monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    status, printed = workspace.llmevo("resume", "run", "--budget", 8)
    assert (status, "taste is voted on by a person and needs a terminal" in printed) == (2, True), printed
    assert (workspace.root / "run/events.jsonl").read_bytes() == written
    keys = [*"abtsabtsabts"]
    status, printed = run(workspace, keys, "resume", "run")
    assert status == 0, printed
    log = workspace.events("run")
    votes = [event for event in log if isinstance(event, events.Voted)]
    assert votes[:3] == before
    assert len(votes) == 3 + 12 - len(keys)
    assert len({(vote.player, vote.other, vote.prompt) for vote in votes}) == len(votes)
    state = workspace.state("run")
    assert state.finished
    assert len(state.trials) == 6
    values = {trial.score.tasks["taste"]["votes,none"] for trial in state.trials.values() if trial.score}
    assert len(values) > 2
    status, printed = workspace.llmevo("replay", "run", "--verify")
    assert status == 0, printed
    file = workspace.root / "run/events.jsonl"
    text = file.read_text()
    (workspace.root / "run/events.jsonl").write_text(text.replace('"choice":"own"', '"choice":"other"', 1))
    status, printed = workspace.llmevo("replay", "run", "--verify")
    assert (status, "by its votes" in printed) == (2, True), printed
    file.write_text(text)
    for words, says in (
        (("replay", "run", "--rescore", 1), "who is not asked again"),
        (("compare", config, "--seeds", 1, "--out", "many"), "votes count in one run only"),
    ):
        status, printed = workspace.llmevo(*words)
        assert (status, says in printed) == (2, True), printed
