"""Items a second: llmevo's request scorers against lm-eval's own, on the same model, weights and questions.

    python benchmarks/evaluation.py --out benchmarks/results/evaluation.jsonl [--rounds 2] [--batch-sizes 1,16]
        [--limit 32] [--fewshot-limit 16] [--shots 12] [--suites quickstart,fixed,drawn] [--truth quickstart]
        [--dtype bfloat16] [--threads 2] [--backend hf|vllm]
    python benchmarks/tables.py benchmarks/results/evaluation.jsonl

With transformers the other is lm-eval's HFLM, with vLLM its VLLM, over the very engine that llmevo scores on: what the
prefix cache holds is forgotten before every turn, as after every change of the weights.

Suites: the quickstart's search tasks; its words and family questions after solved examples, which are the same ones for
every question (`fixed`, as in MMLU) or drawn anew for each (`drawn`, lm-eval's default). In every round all engines
take their turn, A B C A B C; the first round is not counted, as a search asks the same of many candidates. The model is
the quickstart's uniform merge.

Seconds are those of a whole scoring by lm-eval: building requests, model, metrics. The model's part is in the file too.
The answers are compared with llmevo's and, for the suites of `--truth`, all with those of HFLM in float32.
"""

import argparse
import copy
import gc
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import measurements
import tables
import torch
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from measurements import QUICKSTART

from llmevo.config import read_config
from llmevo.engines.hf import HfEngine
from llmevo.engines.scoring.hf import HfScorer
from llmevo.engines.vllm import VllmEngine
from llmevo.evaluation.evaluator import Evaluator
from llmevo.evaluation.tasks.task import AskingOptions, Task
from llmevo.merging.merger import Merger
from llmevo.models.sources import Sources
from llmevo.search.space import SearchSpace

DATA = QUICKSTART.parent / "quickstart" / "tasks"


class Watched(LM):
    """Passes requests on, keeps the answers and the time they took."""

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm, self.seconds = lm, 0.0
        self.answers: dict[str, list[Any]] = {}

    @property
    def tokenizer_name(self) -> str:
        return self.lm.tokenizer_name

    def _ask(self, kind: str, requests: list[Any]) -> list[Any]:
        begun = time.perf_counter()
        self.answers[kind] = getattr(self.lm, kind)(requests, disable_tqdm=True)
        self.seconds += time.perf_counter() - begun
        return self.answers[kind]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        return self._ask("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        return self._ask("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Any]) -> list[str]:
        return self._ask("generate_until", requests)


@dataclass
class Measured:
    """What one engine did in all rounds."""

    whole: list[float] = field(default_factory=list[float])
    model: list[float] = field(default_factory=list[float])
    answers: dict[str, list[Any]] = field(default_factory=dict[str, list[Any]])
    scores: dict[str, float] = field(default_factory=dict[str, float])
    repeats: bool = True
    """Whether every round gave the same answers to the last bit."""

    def turn(self, evaluator: Evaluator, lm: Any, counted: bool) -> None:
        watched, begun = Watched(lm), time.perf_counter()
        score = evaluator.score(watched)
        if counted:
            self.whole.append(time.perf_counter() - begun)
            self.model.append(watched.seconds)
        self.repeats = self.repeats and self.answers in ({}, watched.answers)
        self.answers = watched.answers
        self.scores = {task.name: score.tasks[task.name][task.metric] for task in evaluator.tasks}


def suites(config: Any, limit: int, few: int, shots: int, folder: Path) -> dict[str, Evaluator]:
    search = [QUICKSTART.parent / path for path in config.task_search_path]
    two = [Task(name=f"quickstart_{name}") for name in ("words", "family")]
    plain = {"apply_chat_template": False, "fewshot_as_multiturn": False}
    return {
        "quickstart": Evaluator(config.tasks, AskingOptions(limit=limit, **plain), search),
        "fixed": Evaluator(
            [_fixed(folder, name) for name in ("words", "family")], AskingOptions(few, shots, **plain), [folder]
        ),
        "drawn": Evaluator(two, AskingOptions(few, shots, **plain), search),
    }


def _fixed(folder: Path, name: str) -> Task:
    """A task of the quickstart whose solved examples are the first of its other file."""
    files = {"train": str(DATA / f"{name}.heldout.jsonl"), "test": str(DATA / f"{name}.search.jsonl")}
    made = {
        "task": f"fixed_{name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "test_split": "test",
        "fewshot_split": "train",
        "fewshot_config": {"sampler": "first_n"},
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / f"fixed_{name}.yaml").write_text(json.dumps(made))
    return Task(name=f"fixed_{name}")


def apart(one: Measured, other: Measured) -> dict[str, Any]:
    """How much the answers and scores of one differ from another's: log-likelihoods in nats, counts of how many."""
    pairs = [*zip(one.answers.get("loglikelihood", []), other.answers.get("loglikelihood", []), strict=True)]
    gaps = sorted(abs(a[0] - b[0]) for a, b in pairs)
    texts = [*zip(one.answers.get("generate_until", []), other.answers.get("generate_until", []), strict=True)]
    return {
        "median": round(statistics.median(gaps), 6),
        "greatest": round(gaps[-1], 6),
        "greedy": [sum(a[1] != b[1] for a, b in pairs), len(pairs)],
        "texts": [sum(a != b for a, b in texts), len(texts)],
        "scores": {task: value - other.scores[task] for task, value in one.scores.items()},
    }


def reference(model: Any, tokenizer: Any, batch_size: int) -> Any:
    engine: Any = HFLM
    return engine(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, device="cpu")


def over_vllm(engine: Any) -> Any:
    """lm-eval's own way over a live vLLM, which it would otherwise start by itself.

    It asks for the version of the distribution `vllm`, which the build for CPUs is not called.
    """
    found = metadata.version
    called = metadata.packages_distributions()["vllm"][0]
    metadata.version = lambda name: found(called if name == "vllm" else name)
    try:
        from lm_eval.models import vllm_causallms
    finally:
        metadata.version = found
    live = engine._llm
    vllm_causallms.LLM = lambda **_: live
    model = live.llm_engine.vllm_config.model_config
    return vllm_causallms.VLLM(pretrained=model.model, tokenizer=model.tokenizer, max_model_len=model.max_model_len)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=2)
    made.add_argument("--batch-sizes", default="1,16")
    made.add_argument("--limit", type=int, default=32, help="questions a task of the quickstart")
    made.add_argument("--fewshot-limit", type=int, default=16, help="questions a task with solved examples")
    made.add_argument("--shots", type=int, default=12)
    made.add_argument("--suites", default="quickstart,fixed,drawn")
    made.add_argument("--truth", default="", help="suites to be answered in float32 too; this takes long")
    made.add_argument("--dtype", default="bfloat16")
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    made.add_argument("--backend", choices=("hf", "vllm"), default="hf")
    made.add_argument("--out", type=Path, help="a file to append every round to, as lines of JSON")
    return made


def main() -> None:
    given = parser().parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(given.threads)
    config = read_config(QUICKSTART)
    sources = Sources(QUICKSTART.parent)
    donor = config.genome.references[0]
    folder = sources.folder(donor)
    space = SearchSpace(config.genome, int(sources.config(donor)["num_hidden_layers"]))
    lms: dict[str, Any] = {}
    if given.backend == "vllm":
        engine: Any = VllmEngine(folder, folder, given.dtype, QUICKSTART.parent)
        lms = {"llmevo": engine.lm, "lm-eval's VLLM": over_vllm(engine)}
        forget = engine._llm.reset_prefix_cache
    else:
        engine = HfEngine(folder, folder, given.dtype, merger=Merger(sources, 0))
        lms = {"llmevo": engine.lm}
        for size in filter(None, given.batch_sizes.split(",")):
            lms[f"HFLM, batch {size}"] = reference(engine.model, engine.lm.tokenizer, int(size))
        forget = gc.collect
    engine.swap(space.decode(space.uniform()))
    found: list[dict[str, Any]] = []

    def keep(suite: str, line: dict[str, Any]) -> None:
        where = {"benchmark": "evaluation", "suite": suite, "backend": given.backend, "dtype": given.dtype}
        found.append(measurements.append(given.out, where | line | measurements.environment()))

    with tempfile.TemporaryDirectory() as made:
        chosen = suites(config, given.limit, given.fewshot_limit, given.shots, Path(made))
        for name in given.suites.split(","):
            evaluator = chosen[name]
            table = measure(evaluator, lms, given.rounds, forget)
            for line in report(evaluator.items, table):
                keep(name, line)
            if name in given.truth.split(","):
                for line in truth(engine, evaluator, table):
                    keep(name, line)
    print(tables.markdown(found))
    print(f"\npeak memory of the process {measurements.peak() / 2**30:.2f} GB")


def measure(
    evaluator: Evaluator, lms: dict[str, Any], rounds: int, forget: Callable[[], Any] = gc.collect
) -> dict[str, Measured]:
    table = {name: Measured() for name in lms}
    for turn in range(rounds + 1):
        for name, lm in lms.items():
            forget()
            table[name].turn(evaluator, lm, counted=turn > 0)
    return table


def truth(engine: Any, evaluator: Evaluator, table: dict[str, Measured]) -> Iterator[dict[str, Any]]:
    """How far every engine is from lm-eval's own engine in float32, on the same weights."""
    model = copy.deepcopy(engine.model).float()
    exact = measure(evaluator, {"HFLM": reference(model, engine.lm.tokenizer, 16)}, 0)["HFLM"]
    mine = measure(evaluator, {"llmevo": HfScorer(model, engine.lm.tokenizer)}, 0)["llmevo"]
    for name, measured in {**table, "llmevo in float32": mine}.items():
        yield {"engine": name, "from": "HFLM in float32", **apart(measured, exact)}


def report(items: int, table: dict[str, Measured]) -> Iterator[dict[str, Any]]:
    """The rounds of all engines, and how far the others' answers are from llmevo's."""
    for name, measured in table.items():
        for turn, (whole, model) in enumerate(zip(measured.whole, measured.model, strict=True), 1):
            line = {"engine": name, "round": turn, "items": items, "seconds": whole, "model_seconds": model}
            yield {**line, "repeats": measured.repeats, "scores": measured.scores}
    for name, measured in table.items():
        if name != "llmevo":
            yield {"engine": name, "from": "llmevo", **apart(measured, table["llmevo"])}


if __name__ == "__main__":
    main()
