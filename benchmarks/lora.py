"""Candidates of LoRA experts: merged and scored one after the other, or several at once in one batch over their base.

    python benchmarks/lora.py [--candidates 6] [--at-once 6] [--limits 4] [--rounds 2] [--dtype float32] [--out FILE]
    python benchmarks/lora.py --vllm-ops

Experts that are adapters of one base differ in small factors only: W + Σ wᵢ·Bᵢ·Aᵢ. So candidates can share a batch over
one copy of the base, each row with weights w of its own, and nothing is merged: `engine: {adapters: together}`.
The ways take turns in one process; seconds are the processor's, of all threads, so that a busy machine counts less (run
it with OMP_NUM_THREADS=1).

What came out on a Xeon with AMX, one core, the quickstart's four experts of rank 8, bfloat16: the 35 questions of a
look with five looks, six candidates, two rounds (results/lora.jsonl), in seconds a candidate:

    |                 | swap | log-likelihoods | generation | together | questions a second |
    | merged          | 0.89 |            2.38 |       0.98 |     4.25 |                8.2 |
    | low-rank, all 6 | 0.28 |            2.30 |       0.46 |     3.04 |               11.5 |

1.2 times as fast in one round, 1.7 times in the other: the machine had other work. Half of the gain is the swap, which
a candidate costs once and not once a look (0.28 s are spent on what each adapter counts in each weight), half is
generation: a step for 42 rows takes little longer than one for 7. Log-likelihoods gain nothing: larger batches give
what the factors cost, r(in + out) / (in · out) = 9 % more arithmetic in this model (r = 32 in all). On a quiet machine,
for 20 questions, an earlier version of this was 1.95 times as fast.

In a raced run of the quickstart (llm-off, generations of six, five looks of 35 questions; the log's seconds, the
processor's) a question took 89 ms merged, swaps included, over the first five candidates of a generation, and together
73 and 67 ms over two whole generations: 1.2 to 1.3 times as fast. That was one run each on a machine with other work,
which made equal work take up to 1.4 times as long, and the two searches part after the start rows.

Why it is a choice and not the way:

* What is scored is not what is exported, as the merge is rounded to bfloat16 and this is not. The answers are apart by
  0.11 nats (median; the largest 1.6), 12 % of the texts are others, and scores of 35 questions differ by up to two of
  them. In float32 the two ways agree (`--dtype float32`; tests/test_lowrank.py). Finalists and held-out rows are
  merged.
* Candidates of one batch are raced in step, against the best of the generation before: who is stopped only by one of
  its own generation is asked more.
* It is for one kind of source, and for methods that are linear in the experts.

vLLM's own LoRA requests could serve candidates as well, one adapter of rank Σ rᵢ each. Its processor build takes them
(`enable_lora`), but its code there (lora_ops.py) copies the factors of every single token's adapter, in float32, before
it multiplies: r(in + out) numbers a token and layer. `--vllm-ops` times it alone, without an engine around it, in
milliseconds a block of the model, six candidates:

    |                         | the layers themselves | vLLM's adapters | llmevo's |
    | a step, 4 rows of each  |                   2.6 |            21.9 |      1.6 |
    | texts, 64 tokens each   |                   8.2 |           287.2 |      3.9 |

So it would be slower by far than a swap, and was left there; a GPU has kernels of its own for this.

On a GPU, by arithmetic and not measured: rows are nearly free until a pass is bound by arithmetic instead of reading
weights, at compute / bandwidth = 990e12 / 3.35e12 ≈ 300 tokens of an H100 in bfloat16. A look's log-likelihoods are
some 1400 tokens here, above that. Generation of 4 to 32 rows is far below: six candidates at once would gain up to six
times in it. More is lost to merging on the processor, about 5 ns an entry and core: 40 s of a core for 8e9 weights,
with which the GPU scores 160 questions of 100 tokens in a second (2 · 8e9 · 16e3 = 2.6e14 operations). `together`
merges nothing.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evaluation import Watched
from torch.nn.functional import linear

from llmevo.config import read_config
from llmevo.engines.hf import HfEngine
from llmevo.engines.lora_batching.scorer import Together
from llmevo.evaluation.evaluator import Evaluator
from llmevo.merging.merger import Merger
from llmevo.merging.recipe import Recipe
from llmevo.models.checkpoints import Sources
from llmevo.search.space import SearchSpace

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yml"

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
        self.answers = []
        for part in ("swap", *kinds):
            self.seconds.setdefault(part, []).append(0.0)

    def ask(self, lms: Sequence[Any], requests: Answers) -> None:
        """Every candidate everything, one kind of request after the other."""
        found: list[Answers] = [{} for _ in lms]
        for kind, asked in requests.items():
            for answers, lm in zip(found, lms, strict=True):
                answers[kind] = self.clock(kind, partial(getattr(lm, kind), asked))
        self.answers += found

    @property
    def whole(self) -> list[float]:
        """Of each round."""
        return [sum(parts) for parts in zip(*self.seconds.values(), strict=True)]


Way = Callable[[Sequence[Recipe], Answers, Measured], None]


def one_by_one(engine: Any, recipes: Sequence[Recipe], requests: Answers, into: Measured) -> None:
    """Merge, then score."""
    into.begin([*requests])
    for recipe in recipes:
        into.clock("swap", partial(engine.swap, recipe))
        into.ask([engine.lm], requests)


def batched(together: Together, at_once: int, recipes: Sequence[Recipe], requests: Answers, into: Measured) -> None:
    """The candidates over their base, so many at once."""
    into.begin([*requests])
    for start in range(0, len(recipes), at_once):
        with ExitStack() as stack:
            asked = together.candidates(recipes[start : start + at_once])
            into.ask(into.clock("swap", partial(stack.enter_context, asked)), requests)


def vllm_ops(candidates: int) -> Iterator[dict[str, Any]]:
    """What vLLM's code for LoRA requests takes on a processor beside the linear layers of a block of the quickstart's
    model, and what llmevo's takes: for a step of generation with four rows a candidate, and for longer texts.
    """
    package = find_spec("vllm")
    assert package
    assert package.origin
    file = Path(package.origin).parent / "lora" / "ops" / "torch_ops" / "lora_ops.py"
    found = spec_from_file_location("lora_ops", file)  # without vLLM around it, which takes long to start
    assert found
    assert found.loader
    ops = module_from_spec(found)
    found.loader.exec_module(ops)
    for tokens in (4, 64):
        table = Measured()
        table.begin(["layers", "vllm", "llmevo"])
        for shape in ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)):
            layer(ops, candidates, tokens, *shape, table)
        seconds = {
            part: f"{1e3 * all_of_them[-1]:.1f}" for part, all_of_them in table.seconds.items() if part != "swap"
        }
        yield {"candidates": candidates, "tokens of each": tokens, "milliseconds a block": seconds}


def layer(ops: Any, candidates: int, tokens: int, rows: int, columns: int, into: Measured, rank: int = 32) -> None:
    """One linear layer, so many tokens of each candidate."""
    owners = torch.arange(candidates).repeat_interleave(tokens)
    x, weight = torch.randn(len(owners), columns).bfloat16(), torch.randn(rows, columns).bfloat16()
    down, up = (torch.randn(candidates, 1, *shape).bfloat16() for shape in ((rank, columns), (rows, rank)))
    first, second, shares = down[0, 0], up[0, 0].T.contiguous(), torch.rand(len(owners), rank)
    out, low = torch.zeros(len(owners), rows).bfloat16(), torch.zeros(len(owners), rank)

    def vllm() -> None:
        ops.bgmv_shrink(x, down, low, owners, 1.0)
        ops.bgmv_expand_slice(low, up, out, owners, 0, rows, True)

    def llmevo() -> None:
        out.addmm_((linear(x, first) * shares).bfloat16(), second)

    for part, work in (("layers", partial(linear, x, weight)), ("vllm", vllm), ("llmevo", llmevo)):
        work()
        into.clock(part, work)


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
    arguments.add_argument("--dtype", default="bfloat16", help="of both ways; in float32 they agree")
    arguments.add_argument("--vllm-ops", action="store_true", help="time vLLM's code for adapters instead")
    arguments.add_argument("--out", type=Path, help="a file of JSON lines to append to")
    given = arguments.parse_args()
    warnings.simplefilter("ignore")
    if given.vllm_ops:
        for found in vllm_ops(given.candidates):
            said(found, given.out)
        return
    config = read_config(QUICKSTART)
    sources, dtype = Sources(QUICKSTART.parent), given.dtype
    references = config.genome.references
    folder, layers = sources.folder(references[0]), int(sources.config(references[0])["num_hidden_layers"])
    space = SearchSpace(config.genome.model_copy(update={"dtype": dtype}), layers)
    recipes = [*drawn(space, given.candidates)]
    search = [QUICKSTART.parent / path for path in config.task_search_path]
    cache = config.engine.cache_gb

    engine, base = (HfEngine(folder, folder, dtype, merger=Merger(sources, 0, cache)) for _ in range(2))
    together = Together(base, sources, references, dtype)
    ways: dict[str, Way] = {"merged": partial(one_by_one, engine)}
    for at_once in map(int, given.at_once.split(",")):
        ways[f"low-rank, {at_once} at once"] = partial(batched, together, at_once)
    for limit in map(int, given.limits.split(",")):
        evaluator = Evaluator(config.tasks, replace(config.protocol, limit=limit, blocks=1), search)
        first = Asked(engine.lm)
        engine.swap(recipes[0])  # which compiles kernels and maps files, so no round has to
        evaluator.score(first)
        table = {name: Measured() for name in ways}
        for _ in range(given.rounds):
            for name, way in ways.items():
                way(recipes, first.requests, table[name])
        report(table, evaluator, len(recipes), dtype, given.out)


def report(table: Mapping[str, Measured], evaluator: Evaluator, candidates: int, dtype: str, file: Path | None) -> None:
    """One line a way."""
    whole = table["merged"]
    for name, way in table.items():
        rates = [a / b for a, b in zip(whole.whole, way.whole, strict=True)]
        found = {
            "questions": evaluator.items,
            "dtype": dtype,
            "candidates": candidates,
            "way": name,
            "items a second": round(evaluator.items * candidates / statistics.median(way.whole), 1),
            "times as fast": [round(rate, 2) for rate in rates],
            "seconds": {part: [round(s, 2) for s in rounds] for part, rounds in way.seconds.items()},
            "from merged": apart(whole.answers, way.answers),
            "scores": [round(evaluator.score(Asked(None, answers)).total, 3) for answers in way.answers],
        }
        said(found, file)


def said(found: dict[str, Any], file: Path | None) -> None:
    print(json.dumps(found), flush=True)
    if file:
        with file.open("a") as lines:
            lines.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
