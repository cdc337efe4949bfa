"""Several candidates over one copy of their base, asked together: what is asked of one is answered for all of them.

Use it where the experts are LoRA adapters of one base and a merge is linear in them. Nothing is merged then, and rows
of all candidates share a batch. In float32 the answers are those of merged weights; in 16 bits they differ by rounding,
for a merge is rounded and this is not. Nor do equal candidates get equal scores to the last bit whatever they share a
batch with, as they do when each is scored alone.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from lm_eval.api.model import LM

from llmevo.engines.hf import HfEngine
from llmevo.engines.lora_batching.adapters import Adapters, Shared
from llmevo.engines.lora_batching.coefficients import Shares
from llmevo.engines.scoring.backbone import BatchTensors
from llmevo.engines.scoring.generation import StopStrings, continue_greedily
from llmevo.engines.scoring.hf import Asked, RequestScorer, generated_batches
from llmevo.engines.scoring.packing import Encoded, stem_groups
from llmevo.merging.recipe import Recipe
from llmevo.models.checkpoints import Sources
from llmevo.models.references import ModelReference

CPU_BATCHES = 4
"""So many batches of one candidate's texts make one of several candidates', on a processor: what the adapters add is
then computed in larger pieces. A GPU's are large enough."""


class Together:
    """Candidates of adapters over the base in a running engine."""

    def __init__(self, engine: HfEngine, sources: Sources, references: Sequence[ModelReference], dtype: str) -> None:
        """`references` are the adapters' and perhaps the base's. Raises ConfigError and SourceError as `Adapters`."""
        self.engine = engine
        adapted = [reference for reference in references if reference.lora]
        base = ModelReference(model=adapted[0].model)
        self._base = Recipe.of_one(base, dtype)
        self._shares = Shares(sources, [base, *references])
        self._adapters = Adapters(engine.model, {str(reference): sources[reference] for reference in adapted})
        self.scorer = SharedScorer(engine.model, engine.lm.tokenizer, self._adapters)
        self._adapters.load([self._shares.of(self._base)] * 2)
        with self._adapters.attached():
            self.scorer.try_rows()

    @contextmanager
    def candidates(self, recipes: Sequence[Recipe]) -> Generator[list["Member"]]:
        """One model a recipe, as lm-eval sees it. The engine's own model is the base inside, and stays it afterwards.

        Raises CandidateError when a recipe is not its base plus adapters, and when the base cannot be loaded.
        """
        self._adapters.load([self._shares.of(recipe) for recipe in recipes])
        self.engine.swap(self._base)
        crowd = Crowd(self.scorer, len(recipes))
        with self._adapters.attached():
            yield [Member(crowd, place) for place in range(len(recipes))]


class Crowd:
    """The candidates that are asked together: the first that asks something asks it for all that are still in."""

    def __init__(self, scorer: "SharedScorer", count: int) -> None:
        self.scorer = scorer
        self.still = [*range(count)]
        """The candidates that are asked what comes next."""
        self._answers: dict[str, Mapping[int, list[Any]]] = {}

    def ask(self, kind: str, requests: list[Any], place: int) -> list[Any]:
        """One candidate's answers; kept until all have taken theirs."""
        asked = repr((kind, [request.args for request in requests]))
        answers = self._answers.get(asked, {})
        if place not in answers:
            answers = dict(zip(self.still, self.scorer.ask(kind, requests, self.still), strict=True))
        self._answers[asked] = {other: answer for other, answer in answers.items() if other != place}
        return answers[place]


class Member(LM):
    """One candidate of a crowd, as lm-eval sees it."""

    def __init__(self, crowd: Crowd, place: int) -> None:
        super().__init__()
        self._crowd, self._place = crowd, place

    def leave(self) -> None:
        """Be asked no more."""
        self._crowd.still.remove(self._place)

    @property
    def tokenizer_name(self) -> str:
        return self._crowd.scorer.tokenizer_name

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self._crowd.scorer.apply_chat_template(chat_history, add_generation_prompt)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        return self._crowd.ask("loglikelihood", requests, self._place)

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        return self._crowd.ask("loglikelihood_rolling", requests, self._place)

    def generate_until(self, requests: list[Any]) -> list[str]:
        return self._crowd.ask("generate_until", requests, self._place)


class SharedScorer(RequestScorer):
    """Answers each request for several candidates, in the layout of rows and batches that one alone would have."""

    def __init__(self, model: Any, tokenizer: Any, adapters: Adapters) -> None:
        super().__init__(model, tokenizer)
        self.shared = self._backbone = Shared(model, adapters)
        self._candidates: Sequence[int] = ()
        self._asked = 0
        self._budget = self._batch * CPU_BATCHES if model.device.type == "cpu" else self._batch

    @torch.inference_mode()
    def ask(self, kind: str, requests: list[Any], candidates: Sequence[int]) -> list[list[Any]]:
        """The answers of each of these candidates."""
        if kind == "loglikelihood_rolling" and len(candidates) > 1:  # long texts: full batches without sharing any
            return [answers for candidate in candidates for answers in self.ask(kind, requests, [candidate])]
        self._candidates, self.copies, self._asked = candidates, len(candidates), len(requests)
        answers: list[Any] = getattr(self, kind)(requests)
        return [answers[copy * len(requests) : (copy + 1) * len(requests)] for copy in range(self.copies)]

    @torch.inference_mode()
    def try_rows(self) -> None:
        """Raises ConfigError when two candidates cannot share a batch."""
        self.shared.take([0, 1])
        tokens = torch.full((2, 2), self.eot_token_id, device=self.model.device)
        self.shared.hidden(tokens, torch.ones_like(tokens), torch.arange(2, device=tokens.device).expand(2, 2))

    def _loglikelihood_tokens(self, requests: list[Asked], **_: Any) -> list[tuple[float, bool]]:
        count = len(requests)
        scores, greedy = [0.0] * (count * self.copies), [True] * (count * self.copies)
        # Batches behind one stem come one after another. Each candidate has keys and values of its own for a stem, so
        # there it goes alone: such batches are full anyhow.
        for group in groupby(self._layout(requests), lambda inputs: id(inputs.stems if inputs.stems else inputs)):
            batches = [*group[1]]
            stems = batches[0].stems
            size = 1 if stems else max(1, self._budget // batches[0].tokens.numel())
            for start in range(0, self.copies, size):
                owners = self._candidates[start : start + size]
                self.shared.take(owners)
                stem = self.shared.stem(stems, self.eot_token_id) if stems else None
                for inputs in batches:
                    self.shared.take([owner for owner in owners for _ in inputs.tokens])
                    for place, gained, best in self.shared.answers(_copied(inputs, len(owners), count), stem):
                        scores[place + start * count] += gained
                        greedy[place + start * count] &= best
        return [*zip(scores, greedy, strict=True)]

    def _continued(
        self, requests: list[Encoded], room: int, stops: list[str], options: dict[str, Any]
    ) -> Iterator[tuple[Encoded, list[int]]]:
        stopped, count = StopStrings(self.tokenizer, stops), self._asked
        if not self._greedy(options):  # sampling, beams: transformers' own way, one candidate after the other
            for copy, candidate in enumerate(self._candidates):
                self.shared.take([candidate])
                for request, made in super()._continued(requests, room, stops, options):
                    yield replace(request, place=request.place + copy * count), made
            return
        ordered = sorted(requests, key=lambda request: request.context)
        for stem, members in stem_groups(ordered, self._reach - room if self.stems else 0):
            copies = [
                replace(request, place=request.place + copy * count)
                for copy in range(self.copies)
                for request in members
            ]
            for batch in generated_batches(copies, room, even=False):
                self.shared.take([self._candidates[request.place // count] for request in batch])
                rows = [request.context[len(stem) :] for request in batch]
                made = continue_greedily(self.shared, stem, rows, room, self._ends(), stopped)
                yield from zip(batch, made, strict=True)


def _copied(inputs: BatchTensors, count: int, requests: int) -> BatchTensors:
    """A batch for so many candidates, one after the other."""
    rows, targets = len(inputs.tokens), len(inputs.targets)
    return replace(
        inputs,
        tokens=inputs.tokens.repeat(count, 1),
        positions=inputs.positions.repeat(count, 1),
        ends=inputs.ends.repeat(count, 1),
        heads=torch.cat([inputs.heads + torch.tensor([copy * rows, 0]) for copy in range(count)]),
        bounds=[*(bound + copy * targets for copy in range(count) for bound in inputs.bounds[:-1]), count * targets],
        targets=inputs.targets.repeat(count),
        places=[place + copy * requests for copy in range(count) for place in inputs.places],
    )
