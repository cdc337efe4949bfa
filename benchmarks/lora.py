"""Candidates of LoRA experts: merged and scored one after the other, or several at once in one batch over their base.

    python benchmarks/lora.py [--candidates 6] [--at-once 6] [--limits 4] [--rounds 2] [--dtype float32] [--out FILE]

Experts that are adapters of one base differ in small factors only: W + Σ wᵢ·Bᵢ·Aᵢ. So candidates can share a batch over
one copy of the base, each row with weights w of its own, and nothing is merged. A, B, A, B in one process; seconds are
the processor's, of all threads, so that a busy machine counts little (run it with OMP_NUM_THREADS=1).

What came out (results/lora.jsonl; a Xeon with AMX, the quickstart's four experts of rank 8, bfloat16), in seconds a
candidate, for the 20 questions until a race's first look, six candidates, two rounds:

    |                 | swap | log-likelihoods | generation | together | questions a second |
    | merged          | 0.68 |            0.85 |       0.61 |     2.13 |                9.4 |
    | low-rank, all 6 | 0.01 |            0.85 |       0.24 |     1.09 |               18.3 |

Of the gain, 1.95 times, two thirds are the swap, which a candidate costs once and not once a look, and one third is
generation: a step for 24 rows takes little longer than one for 4. Log-likelihoods gain nothing: larger batches give
what the factors cost, r(in + out) / (in · out) = 9 % more arithmetic in this model (r = 32 in all).

Why it is no part of llmevo, though it gains:

* A candidate of the quickstart's run is asked 5.7 of its ten parts on average. By the figures above a generation of six
  takes 58 s merged (6 swaps, 37 parts) and 42 s in one batch: 1.4 times. But much of that is what small parts lose:
  all 160 questions at once take 9 s, in ten parts 15 s. Fewer looks gain some of it for every model and method. Without
  racing, generation gains 1.5 times (32 rows a candidate, eight at once), the rest nothing: about 1.1 in all, reckoned.
* Candidates of one batch have to be raced in step, and against the best of the generation before.
* What is scored would not be what is exported, as the merge is rounded to bfloat16 and this is not. The answers are
  apart by 0.12 nats (median; the largest 1.5), 4 % of the texts are others, and scores of 20 questions differ by up to
  two of them. In float32 the two ways agree (`--dtype float32`).
* It is for one kind of source, and for methods that are linear in the experts.

On a GPU, by arithmetic and not measured: rows are nearly free until a pass is bound by arithmetic instead of reading
weights, at compute / bandwidth = 990e12 / 3.35e12 ≈ 300 tokens of an H100 in bfloat16. A part's log-likelihoods are 780
tokens here, above that. Generation of 4 to 32 rows is far below: six candidates at once would gain up to six times in
it. More is lost to merging on the processor, about 5 ns an entry and core: 40 s of a core for 8e9 weights, with which
the GPU scores 160 questions of 100 tokens in a second (2 · 8e9 · 16e3 = 2.6e14 operations). But to mend that takes no
batch: merged on the GPU itself, the same weights with factors of rank 64 take 2 · 64 · 8e9 = 1e12 operations and some
50 GB read and written, under 0.1 s. What would be left to gain is generation that asks few questions at a time.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evaluation import Watched
from torch import Tensor
from torch.nn.functional import linear
from transformers import DynamicCache

from llmevo.config import read_config
from llmevo.engines.backbone import Backbone, Inputs
from llmevo.engines.generation import StopStrings, padded_left
from llmevo.engines.hf import HfEngine
from llmevo.engines.packing import filled
from llmevo.engines.requests import CPU_BATCH, GENERATED_BATCH
from llmevo.evaluation import Evaluator
from llmevo.merging import Merger
from llmevo.methods.base import LowRank
from llmevo.planning import plan
from llmevo.recipe import Recipe
from llmevo.sources import Sources
from llmevo.space import SearchSpace

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yml"

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of a block that read one and the same tensor."""

Answers = dict[str, list[Any]]
"""Requests of lm-eval, or the answers to them, by their kind."""


class Asked(Watched):
    """Keeps lm-eval's requests; answers them by a model, or with answers there are."""

    def __init__(self, lm: Any, answers: Answers | None = None) -> None:
        super().__init__(lm)
        self.given = answers
        self.requests: Answers = {}

    def _ask(self, kind: str, requests: list[Any]) -> list[Any]:
        self.requests[kind] = requests
        return self.given[kind] if self.given else super()._ask(kind, requests)


class Group:
    """Linear layers that read one tensor, each W·x + B·(w ∘ (A·x)), with weights w of each row's own candidate.

    A are all experts' A's of all these layers, one under the other, so that they are one product. B are all experts'
    B's of one layer, side by side. Both are shared by all candidates: a candidate is but its w.
    """

    def __init__(self, layers: dict[str, Any], experts: Sequence[Any]) -> None:
        dtype = next(iter(layers.values())).weight.dtype
        self.ranks: dict[str, list[int]] = {}
        downs: list[Tensor] = []
        for name, layer in layers.items():
            factors = [expert.weight(f"{name}.weight") for expert in experts]
            start = sum(map(len, downs))
            downs += [each.down for each in factors]
            self.ranks[f"{name}.weight"] = [len(each.down) for each in factors]
            up = torch.cat([each.up for each in factors], 1).T.to(dtype).contiguous()
            layer.forward = partial(self._forward, layer, start, up)
        self._down = torch.cat(downs).to(dtype)
        self._table = self._of_rows = torch.empty(0, dtype=dtype)
        self._last: tuple[Any, Any] = None, None

    def load(self, candidates: Sequence[dict[str, list[float]]]) -> None:
        """What each expert counts, for each candidate and layer."""
        rows = [
            [
                w
                for name, ranks in self.ranks.items()
                for w, rank in zip(of[name], ranks, strict=True)
                for _ in range(rank)
            ]
            for of in candidates
        ]
        self._table = torch.tensor(rows, dtype=self._down.dtype)

    def give(self, candidates: Tensor) -> None:
        self._of_rows, self._last = self._table[candidates].unsqueeze(1), (None, None)

    def _forward(self, layer: Any, start: int, up: Tensor, x: Tensor) -> Tensor:
        if self._last[0] is not x:
            self._last = x, linear(x, self._down).mul_(self._of_rows).flatten(0, 1)
        out = linear(x, layer.weight, layer.bias)
        out.view(-1, out.shape[-1]).addmm_(self._last[1][:, start : start + len(up)], up)
        return out


class Adapters:
    """The experts' factors beside the weights of their base, which is one for all candidates."""

    def __init__(self, model: Any, experts: Sequence[Any]) -> None:
        self._names = [*experts[0].shapes]
        found: dict[str, dict[str, Any]] = {}
        for name, layer in model.named_modules():
            weight = f"{name}.weight"
            if weight in experts[0].shapes and all(isinstance(one.weight(weight), LowRank) for one in experts):
                block, _, leaf = name.rpartition(".")
                alike = next((leaves[0] for leaves in SAME_INPUT if leaf in leaves), leaf)
                found.setdefault(f"{block}.{alike}", {})[name] = layer
        self.groups = [Group(layers, experts) for layers in found.values()]

    def load(self, recipes: Sequence[Recipe], layers: int) -> None:
        """Take the candidates."""
        candidates = [self._weights(recipe, layers) for recipe in recipes]
        for group in self.groups:
            group.load(candidates)

    def _weights(self, recipe: Recipe, layers: int) -> dict[str, list[float]]:
        """{weight: what each expert counts in it}, as the method task_arithmetic reads it."""
        found: dict[str, list[float]] = {}
        for step in plan(recipe, self._names, layers):
            each, shared = recipe.values(step.of, step.name, step.depth, step.inputs)
            pairs = zip(step.of.sources, each["weight"], strict=True)
            found[step.name] = [w * shared["lambda"] for source, w in pairs if source.model != recipe.base_model]
        return found

    def give(self, candidates: Tensor) -> None:
        """The candidate of each row of the batches that come next."""
        for group in self.groups:
            group.give(candidates)


class Together:
    """Answers requests for several candidates at once, in llmevo's own layout of rows and batches."""

    def __init__(self, engine: HfEngine, adapters: Adapters, tokens: int) -> None:
        self.lm: Any = engine.lm
        self.adapters, self.tokens = adapters, tokens
        self._backbone = Backbone(engine.model)

    @torch.inference_mode()
    def loglikelihood(self, requests: list[Any], candidates: Sequence[int]) -> list[list[tuple[float, bool]]]:
        encoded = [(request.args, *self.lm._encode_pair(*request.args)) for request in requests]
        count = len(requests)
        scores, greedy = [0.0] * (count * len(candidates)), [True] * (count * len(candidates))
        for inputs in self.lm._layout(encoded):
            assert not inputs.stems, "one stem for all rows cannot be: candidates differ in its keys and values"
            size = max(1, self.tokens // inputs.tokens.numel())
            for start in range(0, len(candidates), size):
                some = candidates[start : start + size]
                self.adapters.give(torch.tensor(some).repeat_interleave(len(inputs.tokens)))
                for place, gained, best in self._backbone.answers(_copies(inputs, len(some), count), None):
                    scores[place + start * count] += gained
                    greedy[place + start * count] &= best
        return _parted([*zip(scores, greedy, strict=True)], count)

    @torch.inference_mode()
    def generate_until(self, requests: list[Any], candidates: Sequence[int]) -> list[list[str]]:
        options, tokenizer = requests[0].args[1], self.lm.tokenizer
        assert all(request.args[1] == options for request in requests)
        stops, room = [*options["until"], tokenizer.decode(self.lm.eot_token_id)], options["max_gen_toks"]
        contexts = [self.lm.tok_encode(request.args[0]) for request in requests] * len(candidates)
        owners = torch.tensor(candidates).repeat_interleave(len(requests))
        order = sorted(range(len(contexts)), key=lambda i: -len(contexts[i]))
        texts = [""] * len(contexts)
        for some in filled(order, [len(contexts[i]) + room for i in order], GENERATED_BATCH):
            rows = [contexts[i] for i in some]
            made = self._continued(rows, owners[some], room, StopStrings(tokenizer, stops))
            for i, tokens in zip(some, made, strict=True):
                texts[i] = tokenizer.decode(tokens, skip_special_tokens=True)
                for stop in stops:
                    texts[i] = texts[i].split(stop)[0]
        return _parted(texts, len(requests))

    def _continued(self, rows: list[list[int]], owners: Tensor, room: int, stopped: Any) -> list[list[int]]:
        """See `continue_greedily`, which does not know whose a row is."""
        ends = self.lm._ends()
        tokens, mask = padded_left(rows, ends[0], "cpu")
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache: Any = DynamicCache(config=self.lm.model.config)
        made: list[list[int]] = [[] for _ in rows]
        live = [*range(len(rows))]
        while True:
            self.adapters.give(owners)
            hidden = self._backbone.hidden(tokens, mask, positions, cache)
            for row, token in zip(live, self._backbone.head(hidden[:, -1]).argmax(-1).tolist(), strict=True):
                made[row].append(token)
            over = [len(made[row]) >= room or made[row][-1] in ends or stopped(made[row]) for row in live]
            going = [i for i, done in enumerate(over) if not done]
            if not going:
                return made
            if len(going) < len(live):
                live, kept = [live[i] for i in going], torch.tensor(going)
                cache.batch_select_indices(kept)
                mask, positions, owners = mask[kept], positions[kept], owners[kept]
            tokens = torch.tensor([[made[row][-1]] for row in live])
            positions = positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(live), 1)], 1)


def _parted(answers: list[Any], count: int) -> list[list[Any]]:
    return [answers[start : start + count] for start in range(0, len(answers), count)]


def _copies(inputs: Inputs, count: int, requests: int) -> Inputs:
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


@dataclass
class Measured:
    """What one way took for all candidates, round by round, and its last answers."""

    seconds: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    answers: list[Answers] = field(default_factory=list[Answers])

    def clock(self, part: str, work: Callable[[], Any]) -> Any:
        """Processor seconds are added to the part's of this round."""
        begun = time.process_time()
        made = work()
        self.seconds[part][-1] += time.process_time() - begun
        return made

    def begin(self, kinds: Sequence[str]) -> None:
        for part in ("swap", *kinds):
            self.seconds.setdefault(part, []).append(0.0)

    @property
    def whole(self) -> list[float]:
        """Of each round."""
        return [sum(parts) for parts in zip(*self.seconds.values(), strict=True)]


def one_by_one(engine: HfEngine, recipes: Sequence[Recipe], requests: Answers, into: Measured) -> None:
    """The run's way: merge, then score."""
    into.begin([*requests])
    into.answers = []
    for recipe in recipes:
        into.clock("swap", partial(engine.swap, recipe))
        ask = {kind: partial(getattr(engine.lm, kind), asked) for kind, asked in requests.items()}
        into.answers.append({kind: into.clock(kind, work) for kind, work in ask.items()})


def batched(
    scorer: Together, at_once: int, layers: int, recipes: Sequence[Recipe], requests: Answers, into: Measured
) -> None:
    """The candidates over their base, so many at once."""
    into.begin([*requests])
    into.answers = [{} for _ in recipes]
    into.clock("swap", lambda: scorer.adapters.load(recipes, layers))
    for start in range(0, len(recipes), at_once):
        some = [*range(start, min(len(recipes), start + at_once))]
        for kind, asked in requests.items():
            found = into.clock(kind, partial(getattr(scorer, kind), asked, some))
            for candidate, answers in zip(some, found, strict=True):
                into.answers[candidate][kind] = answers


def apart(one: Sequence[Answers], other: Sequence[Answers]) -> dict[str, float]:
    """How far two ways' answers are from each other."""

    def pairs(kind: str) -> list[tuple[Any, Any]]:
        return [pair for a, b in zip(one, other, strict=True) for pair in zip(a[kind], b[kind], strict=True)]

    gaps = [abs(a[0] - b[0]) for a, b in pairs("loglikelihood")]
    texts = pairs("generate_until")
    return {
        "median nats": float(f"{statistics.median(gaps):.2g}"),
        "largest nats": float(f"{max(gaps):.2g}"),
        "other texts": round(sum(a != b for a, b in texts) / len(texts), 3),
    }


def drawn(space: SearchSpace, count: int) -> Iterator[Recipe]:
    """Candidates around the uniform merge."""
    random = np.random.default_rng(0)
    for _ in range(count):
        shifted = {gene: w + 0.15 * random.standard_normal() for gene, w in space.uniform().items()}
        yield space.decode(space.clamp(shifted))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--candidates", type=int, default=6, help="of a generation")
    arguments.add_argument("--at-once", default="6", help="candidates in one batch")
    arguments.add_argument("--limits", default="4", help="questions a task: 4 until a race's first look, 32 in all")
    arguments.add_argument("--rounds", type=int, default=2)
    arguments.add_argument("--tokens", type=int, default=4 * CPU_BATCH, help="a batch of several candidates' texts")
    arguments.add_argument("--dtype", default="bfloat16", help="of both ways; in float32 they agree")
    arguments.add_argument("--out", type=Path, help="a file of JSON lines to append to")
    given = arguments.parse_args()
    warnings.simplefilter("ignore")
    config = read_config(QUICKSTART)
    sources, dtype = Sources(QUICKSTART.parent), given.dtype
    donor, *named = config.genome.references
    experts = [sources[reference] for reference in named]
    folder, layers = sources.folder(donor), int(sources.config(donor)["num_hidden_layers"])
    space = SearchSpace(config.genome.model_copy(update={"dtype": dtype}), layers)
    recipes = [*drawn(space, given.candidates)]
    engine = HfEngine(folder, folder, dtype, merger=Merger(sources, 0, config.engine.cache_gb))
    base = HfEngine(folder, folder, dtype)
    scorer = Together(base, Adapters(base.model, experts), given.tokens)
    ways: dict[str, Callable[..., None]] = {"merged": partial(one_by_one, engine)}
    for at_once in map(int, given.at_once.split(",")):
        ways[f"low-rank, {at_once} at once"] = partial(batched, scorer, at_once, layers)
    search = [QUICKSTART.parent / path for path in config.task_search_path]
    for limit in map(int, given.limits.split(",")):
        evaluator = Evaluator(config.tasks, replace(config.protocol, limit=limit, blocks=1), search)
        first = Asked(engine.lm)
        engine.swap(recipes[0])  # which compiles kernels and maps files, so no round has to
        evaluator.score(first)
        table = {name: Measured() for name in ways}
        for _ in range(given.rounds):
            for name, way in ways.items():
                way(recipes, first.requests, table[name])
        for name, measured in table.items():
            rates = [a / b for a, b in zip(table["merged"].whole, measured.whole, strict=True)]
            scores = [evaluator.score(Asked(engine.lm, answers)).total for answers in measured.answers]
            found = {
                "questions": evaluator.items,
                "dtype": dtype,
                "candidates": len(recipes),
                "way": name,
                "items a second": round(evaluator.items * len(recipes) / statistics.median(measured.whole), 1),
                "times as fast": [round(rate, 2) for rate in rates],
                "seconds": {part: [round(s, 2) for s in rounds] for part, rounds in measured.seconds.items()},
                "from merged": apart(table["merged"].answers, measured.answers),
                "scores": [round(score, 3) for score in scores],
            }
            said(found, given.out)


def said(found: dict[str, Any], file: Path | None) -> None:
    print(json.dumps(found), flush=True)
    if file:
        with file.open("a") as lines:
            lines.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
