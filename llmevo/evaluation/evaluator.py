"""Scoring: lm-eval's own tasks, metrics and aggregation over the live engine."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from statistics import fmean
from typing import Any

from lm_eval import evaluator
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs

from llmevo.errors import CandidateError, LlmevoError, TaskError, machine_error
from llmevo.evaluation.judges.verdicts import VerdictMemory
from llmevo.evaluation.questions import Compared, blocks, clusters, select_questions, with_choices, words
from llmevo.evaluation.racing import difference, is_beaten
from llmevo.evaluation.recording import Recorder
from llmevo.evaluation.responses import Responses, Unjudged
from llmevo.evaluation.score import Score, aggregate, concatenate, error_of, logged
from llmevo.evaluation.standard_errors import Clusters, ItemScores, of_mean
from llmevo.evaluation.tasks.lm_eval import (
    TEXT,
    JudgedTask,
    answer_text,
    cache_requests,
    check_examples,
    check_metric,
    choices_of,
    exclude_own_question,
    is_size_weighted,
    lm_eval_text,
    mean_metrics,
    members,
    name_failing_questions,
    null_column,
    question_text,
    quiet,
    reply_text,
)
from llmevo.evaluation.tasks.loading import load
from llmevo.evaluation.tasks.task import AskingOptions, Task

BOOTSTRAP = 100
"""Resamples for the standard error of metrics that have no formula for it."""


def _whole(leaf: Any, document: Any) -> str:
    return with_choices(question_text(leaf, document), choices_of(leaf, document))


class Evaluator:
    """Some tasks, loaded once, to be scored again and again on a live model."""

    def __init__(
        self,
        tasks: Sequence[Task],
        asking: AskingOptions,
        search_path: Sequence[Path] = (),
        root: Path = Path(),
        benchmarks: bool = True,
        without: Iterable[str] = (),
        verdicts: VerdictMemory | None = None,
        judges: bool = True,
    ) -> None:
        """Load the tasks. Raises TaskError for an unknown task or metric, and for a task without questions.

        `search_path` are folders with the user's own task files; lm-eval's built-in tasks are read only when a name is
        not found there. Relative paths in a line of `tasks:` start at `root`. Without `benchmarks`, public ones are
        refused. Questions with the same words as one of `without` are left out. Judges and voters write into
        `verdicts`, by default a memory of this evaluator's own. Without `judges`, replies are judged in another
        process: see `responses`. Raises ProposerRefused where a judge's key is missing.
        """
        self.tasks, self.asking = tasks, asking
        self.weights = {task.name: task.weight for task in tasks}
        names = [task.name for task in tasks]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise TaskError(
                f"tasks: {', '.join(sorted(repeated))} is listed twice; give it one line with its weight, and two"
                " files of one name a `name:` each"
            )
        with quiet():
            self._loaded: Any = load(tasks, search_path, root, benchmarks)
        self._leaves: dict[str, Any] = self._loaded["tasks"]
        self._judged = [leaf for leaf in self._leaves.values() if isinstance(leaf, JudgedTask)]
        for leaf in self._judged:
            leaf.seed = asking.seed
            if judges:
                leaf.open()
        self.note_in((verdicts or VerdictMemory()) if judges else None)
        for task in tasks:
            check_metric(task, self._loaded)
        self._counted = {leaf: task.metric.split(",", 1) for task in tasks for leaf in members(task, self._loaded)}
        self._means = {
            task.name
            for task in tasks
            if task.name in self._leaves and task.metric.split(",")[0] in mean_metrics(self._leaves[task.name])
        }
        known = {words(text) for text in without}
        places = {name: self._select(name, leaf, known) for name, leaf in self._leaves.items()}
        self.blocks = blocks(places, asking.blocks if self.raceable else 1)
        """The questions that are asked together: {task: places} of each block."""
        self._excluded = False
        """Whether lm-eval alone would show some questions among their own solved examples."""
        self.without_examples: list[str] = []
        """Tasks whose own file says `num_fewshot: 0`, which counts more than that of `asking`, as in lm-eval."""
        for name, leaf in self._leaves.items():
            if asking.num_fewshot and leaf.get_config("num_fewshot") == 0:
                self.without_examples.append(name)
            if asking.num_fewshot is not None and leaf.get_config("num_fewshot") != 0:
                leaf.set_config(key="num_fewshot", value=asking.num_fewshot)
            elif leaf.get_config("num_fewshot") is None:
                leaf.set_config(key="num_fewshot", value=0)
            check_examples(leaf)
            self._excluded |= exclude_own_question(leaf)
            leaf.set_fewshot_seed(seed=asking.seed)
            cache_requests(leaf)
            name_failing_questions(leaf)

    def note_in(self, verdicts: VerdictMemory | None) -> None:
        """Let judges and voters read and write this memory; None: replies are judged in another process."""
        for leaf in self._judged:
            leaf.verdicts = verdicts

    def _select(self, name: str, leaf: Any, without: set[tuple[str, ...]]) -> list[int]:
        documents = leaf.eval_docs

        def text(place: int) -> str:
            return question_text(leaf, documents[place])

        return select_questions(name, len(documents), text, self.asking, without)

    @property
    def raceable(self) -> bool:
        """True if every counted metric is a mean over questions, so that a block of them predicts the rest."""
        return len(self._means) == len(self.tasks)

    @cached_property
    def clusters(self) -> dict[str, list[int]]:
        """The questions that are the same, in the order in which they are asked."""
        return clusters(self.compared())

    @cached_property
    def groups(self) -> dict[str, dict[str, float]]:
        """{group: {task: its share in the group's metric}}, of the groups whose metric is a mean over their tasks."""
        found: dict[str, dict[str, float]] = {}
        for task in self.tasks:
            leaves, metric = members(task, self._loaded), task.metric.split(",")[0]
            if task.name not in self._leaves and all(metric in mean_metrics(leaf) for leaf in leaves.values()):
                asked = {name: sum(len(block.get(name, ())) for block in self.blocks) for name in leaves}
                sizes = {name: of if is_size_weighted(task, self._loaded) else 1 for name, of in asked.items()}
                found[task.name] = {name: size / sum(sizes.values()) for name, size in sizes.items()}
        return found

    @property
    def sign_conflicts(self) -> list[Task]:
        """Tasks with a positive weight whose own file says that lower is better of the counted metric."""
        lower: set[str] = set()
        for task in self.tasks:
            better = [leaf.higher_is_better() for leaf in members(task, self._loaded).values()]
            if any(each.get(task.metric.split(",")[0]) is False for each in better):
                lower.add(task.name)
        return [task for task in self.tasks if task.weight > 0 and task.name in lower]

    @property
    def items(self) -> int:
        """Questions that one scoring answers."""
        return sum(len(places) for block in self.blocks for places in block.values())

    @property
    def described(self) -> list[str]:
        """Tasks with a description, which a chat begins with as its system message."""
        return [name for name, leaf in self._leaves.items() if leaf.get_config("description")]

    def questions(self) -> Iterator[tuple[str, str]]:
        """(task, text) of every question."""
        for name, leaf, document in self._documents():
            yield name, question_text(leaf, document)

    def compared(self) -> Iterator[Compared]:
        """(task, text, choices) of every question: what tells it from another one."""
        for name, leaf, document in self._documents():
            yield name, question_text(leaf, document), choices_of(leaf, document)

    def _documents(self) -> Iterator[tuple[str, Any, Any]]:
        """(task, leaf, document) task by task, in the order in which they are asked."""
        for name, leaf in self._leaves.items():
            documents = leaf.eval_docs
            for block in self.blocks:
                for place in block.get(name, ()):
                    yield name, leaf, documents[place]

    def requests(self, lm: LM) -> Iterator[tuple[str, Any, list[Any]]]:
        """(task, leaf, lm-eval's requests) of all questions, as `score` makes them; `lm` gives the chat template."""
        chat = self.asking.apply_chat_template
        for name, leaf in self._leaves.items():
            leaf.set_fewshot_seed(seed=self.asking.seed)
            with quiet():
                leaf.build_all_requests(
                    samples=[place for block in self.blocks for place in block.get(name, ())],
                    apply_chat_template=chat,
                    fewshot_as_multiturn=self.asking.fewshot_as_multiturn and chat,
                    chat_template=lm.apply_chat_template if chat else None,
                    tokenizer_name=lm.tokenizer_name if chat else "",
                )
            yield name, leaf, [*leaf.instances]

    @property
    def digest(self) -> str:
        """Return a digest of all questions, of how they are asked, and of the metrics that count.

        The seed belongs to it only where solved examples are drawn with it: its shuffling shows in the questions. The
        questions of lm-eval's tasks are lm-eval's own texts, as in the logs of all versions.
        """
        examples = [leaf.get_config("num_fewshot") for leaf in self._leaves.values()]
        asking = {**asdict(self.asking), "seed": self.asking.seed if any(examples) else None, "shuffle": None}
        for shown in ("share", "after", "blocks"):
            del asking[shown]
        described = {task.name for task in self.tasks if task.kind}
        texts = sorted(
            (name, (question_text if name in described else lm_eval_text)(leaf, document))
            for name, leaf, document in self._documents()
        )
        asked: list[Any] = [[task.model_dump() for task in self.tasks], asking, examples, texts]
        prints = {name: leaf.fingerprint for name, leaf in self._leaves.items() if hasattr(leaf, "fingerprint")}
        asked += [prints] if prints else []
        asked += ["own question excluded"] if self._excluded else []
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    def texts(self) -> dict[str, list[tuple[str, str]]]:
        """{task: (question, right answer) of each}, shortened: for people."""
        found: dict[str, list[tuple[str, str]]] = {}
        for name, leaf, document in self._documents():
            found.setdefault(name, []).append((question_text(leaf, document)[-TEXT:], answer_text(leaf, document)))
        return found

    def descriptions(self) -> dict[str, str]:
        """{task: its own description}, which stands before its questions."""
        given = {name: leaf.get_config("description") for name, leaf in self._leaves.items()}
        return {name: " ".join(str(text).split())[:TEXT] for name, text in given.items() if text}

    def chances(self) -> dict[str, float]:
        """{task: the share of right answers of a model that guesses}, of tasks with choices whose accuracy counts."""
        shares: dict[str, list[float]] = {}
        for name, leaf, document in self._documents():
            if leaf.OUTPUT_TYPE == "multiple_choice" and self._counted[name][0] in ("acc", "acc_norm"):
                shares.setdefault(name, []).append(1 / max(1, len(leaf.doc_to_choice(document))))
        return {name: round(fmean(of), 4) for name, of in shares.items()}

    def repeated_examples(self) -> dict[str, int]:
        """{task: its questions that stand among its solved examples as another row}: these show a model the answer."""
        found: dict[str, int] = {}
        pools: dict[str, dict[tuple[str, ...], list[Any]]] = {}
        for name, leaf, document in self._documents():
            if not leaf.get_config("num_fewshot"):
                continue
            if name not in pools:
                pools[name] = {}
                for example in leaf.sampler.fewshot_docs():
                    pools[name].setdefault(words(_whole(leaf, example)), []).append(example)
            excluded = leaf.fewshot_cfg.split == leaf.config.test_split  # a row itself is no example of its own
            same = pools[name].get(words(_whole(leaf, document)), [])
            if any(not excluded or example != document for example in same):
                found[name] = found.get(name, 0) + 1
        return found

    def null_columns(self) -> dict[str, tuple[str, int]]:
        """{task: (column, how many)} of questions that show a column without a value, as `None`."""
        found: dict[str, tuple[str, int]] = {}
        for name, leaf, document in self._documents():
            column = null_column(leaf, document)
            if column and found.get(name, (column, 0))[0] == column:
                found[name] = column, found.get(name, (column, 0))[1] + 1
        return found

    def model_inputs(self) -> Iterator[str]:
        """An approximation of the model's input for each question: solved examples, question and choices. For
        forecasts.
        """
        for _, leaf, document in self._documents():
            choices = leaf.doc_to_choice(document) if leaf.config.doc_to_choice is not None else []
            examples = 1 + int(leaf.get_config("num_fewshot") or 0)
            yield question_text(leaf, document) * examples + "".join(f" {choice}" for choice in choices)

    def context_needs(self) -> Iterator[tuple[str, str, int]]:
        """(task, model input, tokens of the reply at most) of the questions that must fit into the context at once: all
        but texts that are read in windows.
        """
        replies = self.reply_tokens
        for (name, leaf, _), text in zip(self._documents(), self.model_inputs(), strict=True):
            if leaf.OUTPUT_TYPE != "loglikelihood_rolling":
                yield name, text, replies.get(name, 0)

    @property
    def reply_tokens(self) -> dict[str, int]:
        """{task: the tokens of a reply at most}, of tasks with written replies."""
        writing = {name: leaf for name, leaf in self._leaves.items() if leaf.OUTPUT_TYPE == "generate_until"}
        options: dict[str, Any] = {name: leaf.get_config("generation_kwargs") or {} for name, leaf in writing.items()}
        with quiet():
            read: dict[str, Any] = {name: normalize_gen_kwargs(of) for name, of in options.items()}
        return {name: of["max_gen_toks"] for name, of in read.items()}

    def prompts(self, count: int) -> list[str]:
        """The first questions that have a written reply."""
        texts = (question_text(leaf, doc) for _, leaf, doc in self._documents() if leaf.OUTPUT_TYPE == "generate_until")
        return [*islice(texts, count)]

    def check(self) -> None:
        """Raise ProposerRefused, before a run starts, where a judge cannot be reached."""
        for leaf in self._judged:
            leaf.check()

    @property
    def inquiries(self) -> int:
        """Requests to LLM judges for one scoring, at most. For forecasts."""
        return sum(leaf.inquiries(document) for _, leaf, document in self._documents() if isinstance(leaf, JudgedTask))

    def judge_texts(self) -> dict[str, str]:
        """{name: text} of the instructions of judges, for the log."""
        return {name: text for leaf in self._judged for name, text in leaf.texts.items()}

    def score(self, lm: LM, begun: Score | None = None) -> Score:
        """The score on all questions; of a model that was stopped before, only the rest is asked. Raises CandidateError
        when a task fails or a metric is not a number.
        """
        first = self.parts_of(begun) if begun else 0
        rest = [self.score_block(lm, place) for place in range(first, len(self.blocks))]
        return self.joined([begun, *rest] if begun else rest)

    def joined(self, parts: Sequence[Score]) -> Score:
        """The score on several blocks together, the first ones first."""
        return concatenate(self.tasks, parts, self.clusters)

    def race(self, lm: LM, rivals: Sequence[Score], error_rate: float, begun: Score | None = None) -> Score:
        """The score block by block, until the model cannot overtake the best rival on all questions: see `stopped`. A
        model that was stopped before continues there.
        """
        score = begun or self.score_block(lm, 0)
        parts = [score]
        while (place := self.parts_of(score)) < len(self.blocks):
            if found := self.stopped(score, rivals, error_rate):
                return found
            parts.append(self.score_block(lm, place))
            score = self.joined(parts)
        return score

    def stopped(self, score: Score, rivals: Sequence[Score], error_rate: float) -> Score | None:
        """The score of a model that is to be stopped at this one: the best rival's and the difference on the questions
        that both were asked. None when it is to go on; see `racing`. The rivals were asked all questions, the best is
        first.
        """
        own, field = score.item_scores, [rival.item_scores for rival in rivals]
        gap = difference(own, field[0], self.weights).mean
        if not is_beaten(own, field, self.weights, self.parts_of(score), len(self.blocks), error_rate, self.clusters):
            return None
        return replace(score, total=rivals[0].total + gap)

    def outlasts(self, score: Score, rivals: Sequence[Score], error_rate: float) -> bool:
        """Whether a model with this score would not have been stopped after any of its blocks but the last one: see
        `stopped`.
        """
        field = [rival.item_scores for rival in rivals]
        for look in range(1, self.parts_of(score)):
            asked = {name: sum(len(block.get(name, ())) for block in self.blocks[:look]) for name in self.weights}
            own = {name: score.item_scores[name][:count] for name, count in asked.items()}
            if is_beaten(own, field, self.weights, look, len(self.blocks), error_rate, self.clusters):
                return False
        return True

    def parts_of(self, score: Score) -> int:
        """The number of blocks that a score is of; 0 when its questions were divided in another way."""
        sizes = [*accumulate(sum(map(len, block.values())) for block in self.blocks)]
        return sizes.index(score.items) + 1 if score.items in sizes else 0

    def is_judged(self, place: int) -> bool:
        """Whether a judge or a voter is asked for the score on this block."""
        return any(leaf.task_name in self.blocks[place] for leaf in self._judged)

    def responses(self, lm: LM, place: int) -> Responses:
        """The model's responses to a block with judged replies; only where there are no judges. On a `Replay` of them,
        `score_block` gives the score in another process. Raises as `score_block` does.
        """
        recorder = Recorder(lm)
        with suppress(Unjudged):
            self.score_block(recorder, place)
        return Responses(sum(map(len, self.blocks[place].values())), recorder.answers)

    def score_block(self, lm: LM, place: int) -> Score:
        """The score on one block of the questions; see `score`. Raises MachineError when the machine fails and not the
        model.
        """
        return self.score_questions(lm, self.blocks[place], self.clusters if place == 0 else None)

    def _group_error(self, task: Task, found: Mapping[str, Any], item_scores: ItemScores) -> float | None:
        """The standard error of a group's metric from those of its tasks; None where it is not their mean. lm-eval has
        none for a task of one question, and 0 where all its answers are alike.
        """
        shares = self.groups.get(task.name, {})
        if not shares or task.name not in found or not all(item_scores.get(name) for name in shares):
            return None
        mean = sum(share * fmean(item_scores[name]) for name, share in shares.items())
        if abs(mean - found[task.name].get(task.metric, math.nan)) > 1e-3:  # a group of groups
            return None
        return math.sqrt(sum((share * of_mean(item_scores[name])) ** 2 for name, share in shares.items()))

    def score_questions(self, lm: LM, block: Mapping[str, Sequence[int]], clusters: Clusters | None = None) -> Score:
        """The score on questions by their places in each task; see `score_block`. `clusters` are those asked twice."""
        asking = self.asking
        loaded: Any = {**self._loaded, "tasks": {name: leaf for name, leaf in self._leaves.items() if name in block}}
        for leaf in loaded["tasks"].values():
            # A task draws its examples from one generator that runs on: every candidate must see the same ones.
            leaf.set_fewshot_seed(seed=asking.seed)
        try:
            with quiet():
                results: Any = evaluator.evaluate(
                    lm=lm,
                    task_dict=loaded,
                    samples={name: [*places] for name, places in block.items()},
                    bootstrap_iters=BOOTSTRAP,
                    apply_chat_template=asking.apply_chat_template,
                    fewshot_as_multiturn=asking.fewshot_as_multiturn and asking.apply_chat_template,
                )
        except (LlmevoError, KeyboardInterrupt):
            raise
        except Exception as error:  # a task may run any code: its errors fail the candidate, not the run
            if found := machine_error(error):
                raise found from error
            names = ", ".join(self._leaves)
            raise CandidateError(f"scoring of {names} failed: {type(error).__name__}: {error}") from error
        item_scores: dict[str, list[float]] = {}
        replies: dict[str, list[str]] = {}
        for name, (metric, filter_) in self._counted.items():
            if name not in block:
                continue
            samples = [sample for sample in results["samples"][name] if sample["filter"] == filter_]
            replies[name] = [reply_text(self._leaves[name], sample) for sample in samples]
            values = [sample.get(metric) for sample in samples]
            # Of another metric they are no parts of a sum: a log-likelihood each, of a perplexity.
            is_mean = metric in mean_metrics(self._leaves[name])
            if is_mean and values and all(isinstance(value, float | int) for value in values):
                # As the log has them, so that what follows from them is the same when it is read again.
                item_scores[name] = [logged(float(value)) for value in values]
        found = results["results"] | (results.get("groups") or {})
        for task in self.tasks:
            if (stderr := self._group_error(task, found, item_scores)) is not None:
                found[task.name] = {**found[task.name], error_of(task.metric): stderr}
        means = {task: own for task, own in item_scores.items() if task in self._means}
        score = aggregate(
            [task for task in self.tasks if task.name in found],
            found,
            sum(map(len, block.values())),
            means,
            clusters,  # later blocks are joined to the first one
        )
        return replace(score, item_scores=item_scores, replies=replies)
