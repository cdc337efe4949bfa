"""Scoring: lm-eval's own tasks, metrics and aggregation over the live engine."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from lm_eval import evaluator
from lm_eval.api.metrics import mean
from lm_eval.api.model import LM

from llmevo.errors import CandidateError, LlmevoError, TaskError, machine_error
from llmevo.evaluation.judges.memory import VerdictMemory
from llmevo.evaluation.judges.poll import AskVoter
from llmevo.evaluation.questions import blocks, chosen, words
from llmevo.evaluation.racing import difference, is_beaten
from llmevo.evaluation.score import Score, aggregate, concatenate
from llmevo.evaluation.standard_errors import Clusters, clusters
from llmevo.evaluation.tasks.loading import blame, build_once, check_metric, load, members
from llmevo.evaluation.tasks.prompts import Writing
from llmevo.evaluation.tasks.quiet import quiet
from llmevo.evaluation.tasks.task import AskingOptions, Task
from llmevo.evaluation.tasks.wording import TEXT, answer, plain, reply, wording

BOOTSTRAP = 100
"""Resamples for the standard error of metrics that have no formula for it."""


class Evaluator:
    """Some tasks, loaded once, to be scored again and again on a live model."""

    def __init__(
        self,
        tasks: Sequence[Task],
        protocol: AskingOptions,
        search_path: Sequence[Path] = (),
        root: Path = Path(),
        benchmarks: bool = True,
        without: Iterable[str] = (),
    ) -> None:
        """Load the tasks. Raises TaskError for an unknown task or metric, and for a task without questions.

        `search_path` are folders with the user's own task files; lm-eval's built-in tasks are looked at only
        when a name is not found there. Relative paths in a line of `tasks:` start at `root`.
        Without `benchmarks`, public ones are refused. Questions that say the same as one of `without` are left out.
        """
        self.tasks, self.protocol = tasks, protocol
        names = [task.name for task in tasks]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise TaskError(f"tasks: {', '.join(sorted(repeated))} is listed twice; give it one line with its weight")
        with quiet():
            self._loaded: Any = load(tasks, search_path, root, benchmarks)
        leaves: dict[str, Any] = self._loaded["tasks"]
        for task in tasks:
            check_metric(task, self._loaded)
        self._counted = {leaf: task.metric.split(",", 1) for task in tasks for leaf in members(task, self._loaded)}
        known = {words(text) for text in without}
        asked = {name: chosen(name, leaf, protocol, known) for name, leaf in leaves.items()}
        self.blocks = blocks(asked, protocol.blocks if self.raceable else 1)
        """Which questions are asked together: {task: places} of each part."""
        for leaf in leaves.values():
            if protocol.num_fewshot is not None and leaf.get_config("num_fewshot") != 0:
                leaf.set_config(key="num_fewshot", value=protocol.num_fewshot)
            elif leaf.get_config("num_fewshot") is None:
                leaf.set_config(key="num_fewshot", value=0)
            leaf.set_fewshot_seed(seed=protocol.seed)
            build_once(leaf)
            blame(leaf)

    @property
    def raceable(self) -> bool:
        """Whether a part of the questions says something of all: every counted metric is a mean over questions."""
        return len(self._means) == len(self.tasks)

    @cached_property
    def _means(self) -> set[str]:
        """The tasks whose counted metric is a mean over their questions."""
        leaves: dict[str, Any] = self._loaded["tasks"]
        return {
            task.name
            for task in self.tasks
            if task.name in leaves and leaves[task.name].aggregation().get(task.metric.split(",")[0]) is mean
        }

    @cached_property
    def same(self) -> Clusters:
        """Which questions have the same text, in the order in which they are asked."""
        texts: dict[str, list[tuple[str, str]]] = {}
        for name, leaf, document in self._documents():
            texts.setdefault(name, []).append((wording(leaf, document)[-TEXT:], ""))
        return clusters(texts)

    @property
    def upside_down(self) -> list[Task]:
        """Tasks that say that lower is better of the metric that counts, with a weight as if higher were."""
        leaves: dict[str, Any] = self._loaded["tasks"]
        return [
            task
            for task in self.tasks
            if task.weight > 0
            and any(
                leaves[name].higher_is_better().get(task.metric.split(",")[0]) is False
                for name in members(task, self._loaded)
            )
        ]

    @property
    def weights(self) -> dict[str, float]:
        """What each task counts in the objective."""
        return {task.name: task.weight for task in self.tasks}

    @property
    def items(self) -> int:
        """Questions that one scoring answers."""
        return sum(len(places) for block in self.blocks for places in block.values())

    @property
    def described(self) -> list[str]:
        """Tasks with a description, which a chat begins with as its system message."""
        return [name for name, leaf in self._loaded["tasks"].items() if leaf.get_config("description")]

    def questions(self) -> Iterator[tuple[str, str]]:
        """(task, text) of every question: what must not stand in two sets."""
        for name, leaf, document in self._documents():
            yield name, wording(leaf, document)

    def _documents(self) -> Iterator[tuple[str, Any, Any]]:
        """Task by task, in the order in which they are asked."""
        for name, leaf in self._loaded["tasks"].items():
            documents = leaf.eval_docs
            for block in self.blocks:
                for place in block.get(name, ()):
                    yield name, leaf, documents[place]

    @property
    def digest(self) -> str:
        """Of all that is asked, how, and what counts of it.

        The seed belongs to it only where solved examples are drawn with it: what it shuffles shows in the questions.
        """
        examples = [leaf.get_config("num_fewshot") for leaf in self._loaded["tasks"].values()]
        protocol = {**asdict(self.protocol), "seed": self.protocol.seed if any(examples) else None, "shuffle": None}
        for shown in ("share", "after", "blocks"):
            del protocol[shown]
        asked = [[task.model_dump() for task in self.tasks], protocol, examples, sorted(self._digested())]
        leaves: dict[str, Any] = self._loaded["tasks"]
        prints = {name: leaf.fingerprint for name, leaf in leaves.items() if hasattr(leaf, "fingerprint")}
        return hashlib.sha256(json.dumps([*asked, prints] if prints else asked).encode()).hexdigest()

    def _digested(self) -> Iterator[tuple[str, str]]:
        """(task, text) of every question. Of lm-eval's tasks it is lm-eval's text: by it old runs are known again."""
        described = {task.name for task in self.tasks if task.kind}
        for name, leaf, document in self._documents():
            yield name, wording(leaf, document) if name in described else plain(leaf, document)

    def texts(self) -> dict[str, list[tuple[str, str]]]:
        """{task: (question, right answer) of each}, shortened: for people."""
        found: dict[str, list[tuple[str, str]]] = {}
        for name, leaf, document in self._documents():
            found.setdefault(name, []).append((wording(leaf, document)[-TEXT:], answer(leaf, document)))
        return found

    def read(self) -> Iterator[str]:
        """Roughly what a model reads: each question once, solved examples and choices included. For forecasts."""
        for _, leaf, document in self._documents():
            choices = leaf.doc_to_choice(document) if leaf.config.doc_to_choice is not None else []
            examples = 1 + int(leaf.get_config("num_fewshot") or 0)
            yield wording(leaf, document) * examples + "".join(f" {choice}" for choice in choices)

    def prompts(self, count: int) -> list[str]:
        """The first questions that are replied to in words."""
        texts = (wording(leaf, doc) for _, leaf, doc in self._documents() if leaf.OUTPUT_TYPE == "generate_until")
        return [*islice(texts, count)]

    def rooms(self) -> Iterator[tuple[str, str, int]]:
        """(task, what is read, tokens to be written at most) of what must fit into the context at once: everything but
        texts that are read in windows.
        """
        for (name, leaf, _), text in zip(self._documents(), self.read(), strict=True):
            if leaf.OUTPUT_TYPE != "loglikelihood_rolling":
                options: dict[str, Any] = leaf.get_config("generation_kwargs") or {}
                writes = leaf.OUTPUT_TYPE == "generate_until"
                yield name, text, int(options.get("max_gen_toks") or 256) if writes else 0

    def check(self) -> None:
        """Find out before a run starts whether judges can be asked. Raises ProposerRefused if not."""
        for leaf in self._written:
            leaf.check()

    @property
    def inquiries(self) -> int:
        """How often LLM judges are asked for one scoring, at most. For forecasts."""
        return sum(leaf.inquiries(document) for _, leaf, document in self._documents() if isinstance(leaf, Writing))

    def told(self) -> dict[str, str]:
        """What judges are told, for the log."""
        return {name: text for leaf in self._written for name, text in leaf.texts.items()}

    def consult(self, book: VerdictMemory, booth: AskVoter | None) -> None:
        """From now on judges and voters write into this book, and a person votes in this booth."""
        for leaf in self._written:
            leaf.book, leaf.booth, leaf.seed = book, booth, self.protocol.seed

    @property
    def _written(self) -> list[Writing]:
        return [leaf for leaf in self._loaded["tasks"].values() if isinstance(leaf, Writing)]

    def score(self, lm: LM, begun: Score | None = None) -> Score:
        """Ask everything and weigh it; of a model that was stopped once, the rest. Raises CandidateError when a task
        fails or a metric is not a number.
        """
        first = self.parts_of(begun) if begun else 0
        rest = [self.score_block(lm, place) for place in range(first, len(self.blocks))]
        return concatenate(self.tasks, [begun, *rest] if begun else rest, self.same)

    def race(self, lm: LM, rivals: Sequence[Score], error_rate: float, begun: Score | None = None) -> Score:
        """Ask part by part, and stop once the model cannot get ahead of the best rival on all questions: see
        `stopped`. One that was stopped once goes on from there.
        """
        score = begun or self.score_block(lm, 0)
        parts = [score]
        while (place := self.parts_of(score)) < len(self.blocks):
            if found := self.stopped(score, rivals, error_rate):
                return found
            parts.append(self.score_block(lm, place))
            score = concatenate(self.tasks, parts, self.same)
        return score

    def stopped(self, score: Score, rivals: Sequence[Score], error_rate: float) -> Score | None:
        """The score of a model that is to be stopped where it is: the best rival's and the difference on what both were
        asked. None when it is not; see `racing`. The rivals were asked everything, the best comes first.
        """
        own, field = score.item_scores, [rival.item_scores for rival in rivals]
        gap = difference(own, field[0], self.weights).mean
        if not is_beaten(own, field, self.weights, self.parts_of(score), len(self.blocks), error_rate, self.same):
            return None
        return replace(score, total=rivals[0].total + gap)

    def parts_of(self, score: Score) -> int:
        """How many parts of the questions a score is of; 0 when it is of parts that were cut otherwise."""
        sizes = [*accumulate(sum(map(len, block.values())) for block in self.blocks)]
        return sizes.index(score.items) + 1 if score.items in sizes else 0

    def score_block(self, lm: LM, place: int) -> Score:
        """Ask one part of the questions; see `score`. Raises MachineError when the machine fails and not the model."""
        protocol, block = self.protocol, self.blocks[place]
        loaded: Any = {**self._loaded, "tasks": {n: leaf for n, leaf in self._loaded["tasks"].items() if n in block}}
        for leaf in loaded["tasks"].values():
            # A task draws its examples from one generator that runs on: every candidate must see the same ones.
            leaf.set_fewshot_seed(seed=protocol.seed)
        try:
            with quiet():
                results: Any = evaluator.evaluate(
                    lm=lm,
                    task_dict=loaded,
                    samples=block,
                    bootstrap_iters=BOOTSTRAP,
                    apply_chat_template=protocol.apply_chat_template,
                    fewshot_as_multiturn=protocol.fewshot_as_multiturn and protocol.apply_chat_template,
                )
        except (LlmevoError, KeyboardInterrupt):
            raise
        except Exception as error:  # a task is anybody's code: whatever it raises costs the candidate, not the run
            if found := machine_error(error):
                raise found from error
            asked = ", ".join(self._loaded["tasks"])
            raise CandidateError(f"scoring of {asked} failed: {type(error).__name__}: {error}") from error
        items = sum(len(places) for places in block.values())
        samples, found = results["samples"], results["results"] | (results.get("groups") or {})
        item_scores = self._item_scores(samples)
        means = {task: own for task, own in item_scores.items() if task in self._means}
        same = self.same if place == 0 else None  # later parts are joined to it
        score = aggregate([task for task in self.tasks if task.name in found], found, items, means, same)
        return replace(
            score,
            item_scores=item_scores,
            replies=self._replies(samples),
        )

    def _item_scores(self, samples: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[float]]:
        """The counted metric question by question, where it is a number."""
        found: dict[str, list[float]] = {}
        for name, (metric, filter_) in self._counted_of(samples):
            values = [sample.get(metric) for sample in samples[name] if sample["filter"] == filter_]
            if values and all(isinstance(value, float | int) for value in values):
                # As the log has them, so that what follows from them is the same when it is read again.
                found[name] = [round(float(value), 4) for value in values if value is not None]
        return found

    def _replies(self, samples: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[str]]:
        """What was answered, in words."""
        return {
            name: [reply(self._loaded["tasks"][name], s) for s in samples[name] if s["filter"] == filter_]
            for name, (_, filter_) in self._counted_of(samples)
        }

    def _counted_of(self, samples: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[str]]]:
        """(task, its metric and filter) of the tasks that were asked."""
        return ((name, counted) for name, counted in self._counted.items() if name in samples)
