"""The time, memory, tokens and cost of a run: estimated on this machine, or measured on one scored candidate."""

import math
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from llmevo.engines.half_precision import fastest_products
from llmevo.evaluation.evaluator import Evaluator
from llmevo.evaluation.score import Score
from llmevo.models.references import folder_of
from llmevo.models.tokenizer import load_tokenizer
from llmevo.run.experiment import Experiment, population
from llmevo.run.preflight.base import Finding, Findings, folders, names, tokenizer_donor
from llmevo.run.progress import finalists_at_most, heldout_rows, votes_at_most
from llmevo.run.scorer import Scorer
from llmevo.search.objectives.scalarize import random_weights
from llmevo.search.prompts.question import Prompt
from llmevo.search.trial import Candidate, Suggestion, Trial

EFFICIENCY = 0.35
"""The share of a large matrix product's speed that scoring reaches (measured on a 135M model, bf16, 2 CPU cores)."""

ANSWER = 400
"""Tokens of an LLM's answer whose length no prompt fixes."""

EXPECTED = 0.6
"""The accuracy for which the error of the held-out score is forecast."""

GB = 1e9


@dataclass(frozen=True)
class Measured:
    """The seconds that merging one candidate and scoring it on the search questions took."""

    merge: float
    evaluate: float
    items: int

    @property
    def items_per_second(self) -> float:
        return self.items / self.evaluate if self.evaluate else 0.0


@dataclass(frozen=True)
class Forecast:
    """A rough forecast of what a run takes."""

    evaluations: int
    start_rows: int
    generations: int
    population: int
    items: int
    """Search questions of a candidate."""
    all_items: int
    """Questions of the whole run, selection and held-out ones included."""
    tokens: int
    """Tokens of the search questions."""
    seconds: float
    """Of the whole run, without the LLM's answers and a person's votes."""
    prompts: int
    """At most: one for every generation from the first prompt on."""
    prompt_tokens: int
    completion_tokens: int
    cost: float | None
    """Of the prompts; None where a server answers them and `llm.price` is not set."""
    by_server: bool
    """Whether a server answers the prompts."""
    inquiries: int
    """Questions to LLM judges, at most; not in the cost."""
    votes: int
    """Questions to a person, at most."""
    measured: Measured | None
    """The basis of the seconds; None where they are an estimate."""
    workers: int = 1
    """Candidates that are scored at the same time."""
    selection_items: int = 0
    """Questions that finalists answer besides."""
    heldout_items: int = 0
    heldout_error: float | None = None
    """The standard error of the held-out score at an accuracy of 0.6; None without held-out questions."""


def measure(experiment: Experiment) -> Measured:
    """Merge and score the uniform candidate, with the share of the processor that a worker has. Raises CandidateError
    where that fails.
    """
    recipe = experiment.space.decode(experiment.space.uniform())
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, int(threads * _share(experiment))))
    try:
        score, seconds = experiment.scorer.score(recipe)
    finally:
        torch.set_num_threads(threads)
    return Measured(seconds["merge"], seconds["evaluate"], score.items)


@dataclass(frozen=True)
class FirstPrompt:
    """The first prompt of a run, and its generation: 0 if it is made before the start rows are scored."""

    prompt: Prompt
    generation: int


def forecast(experiment: Experiment, first: FirstPrompt | None, measured: Measured | None = None) -> Forecast:
    """Return the forecast from one measured candidate, or else from the lengths of the texts, the models' size and the
    speed of this machine's matrix products.
    """
    config, budget = experiment.config, experiment.config.search.budget
    tokenizer = load_tokenizer(tokenizer_donor(experiment.scorer)[1])

    def tokens(evaluator: Evaluator | None) -> int:
        return sum(len(tokenizer.encode(text)) for text in evaluator.model_inputs()) if evaluator else 0

    items, searched, held_out = experiment.evaluator.items, tokens(experiment.evaluator), tokens(experiment.heldout)
    selection, heldout_items = experiment.scorer.selection, experiment.heldout.items if experiment.heldout else 0
    selection_items = selection.items if selection else 0
    if measured:
        each = measured.merge + measured.evaluate
        final = measured.merge + measured.evaluate * selection_items / items
        last = measured.merge + measured.evaluate * heldout_items / items
    else:
        shapes = experiment.sources[config.genome.references[0]].shapes
        parameters = sum(math.prod(shape) for name, shape in shapes.items() if "embed" not in name)
        speed = _speed() * EFFICIENCY * _share(experiment)
        each, final, last = (count * 2 * parameters / speed for count in (searched, tokens(selection), held_out))
    origins = [row.origin for row in experiment.start_rows]
    workers = experiment.worker_count if experiment.order else 1
    evaluations, size = experiment.evaluations, max(population(experiment), workers)
    size = min(size, experiment.optimizer().largest or size)
    start = min(1, len(origins)) + _waves(len(origins) - 1, workers)  # the first start row is scored alone
    at_once = size / _waves(size, workers) if experiment.order == "strict" else workers
    if budget.minutes is not None:
        later = int((budget.minutes * 60 / each - start) * at_once)
        evaluations = max(len(origins), min(evaluations, len(origins) + later))
    whole, rest = divmod(evaluations - len(origins), size)
    waves = whole * _waves(size, workers) + _waves(rest, workers)
    if experiment.order == "steady":
        waves = _waves(evaluations - len(origins), workers)
    rows = heldout_rows(origins, bool(config.engine.quantize)) if experiment.heldout else 0
    finalists = finalists_at_most(config.search.finalists, len(config.constraints), origins)
    again = finalists if config.engine.finals_format else 0  # each on all its questions
    all_its = items + selection_items
    selected = finalists if selection else 0
    generations = max(0, math.ceil((evaluations - len(origins)) / size))
    prompt, price = first.prompt if first else None, config.llm.price
    asked = sum(len(tokenizer.encode(message["content"])) for message in prompt.messages) if prompt else 0
    answered = prompt.integers * prompt.digits * prompt.samples if prompt and prompt.integers else ANSWER
    prompts = max(0, generations - first.generation + 1) if first else 0
    prompts = min(prompts, prompts if config.llm.max_calls is None else config.llm.max_calls)
    read, written = prompts * asked * 2, prompts * answered  # prompts grow with the number of trials
    by_server = prompts > 0 and experiment.proposer_name == "openai"
    return Forecast(
        evaluations=evaluations,
        start_rows=len(origins),
        generations=generations,
        population=size,
        items=items,
        all_items=evaluations * items + selected * selection_items + again * all_its + rows * heldout_items,
        tokens=searched,
        seconds=(start + waves + _waves(again, workers) * all_its / items) * each
        + _waves(selected, workers) * final
        + _waves(rows, workers) * last,
        prompts=prompts,
        prompt_tokens=read,
        completion_tokens=written,
        cost=None
        if by_server and not price.model_fields_set
        else (read * price.prompt + written * price.completion) / 1e6,
        by_server=by_server,
        inquiries=(evaluations + again) * experiment.evaluator.inquiries
        + (selected + again) * (selection.inquiries if selection else 0)
        + rows * (experiment.heldout.inquiries if experiment.heldout else 0),
        votes=votes_at_most(config, evaluations, origins, selection is not None),
        measured=measured,
        workers=workers,
        selection_items=selection_items,
        heldout_items=heldout_items,
        heldout_error=_error(experiment.heldout) if experiment.heldout else None,
    )


def _error(evaluator: Evaluator) -> float:
    """The standard error of a score where each task has the accuracy `EXPECTED`, and a repeated question one answer."""
    squares = 0.0
    for name, weight in evaluator.weights.items():
        if asked := evaluator.clusters.get(name):
            squares += weight**2 * sum(count**2 for count in Counter(asked).values()) / len(asked) ** 2
    return math.sqrt(EXPECTED * (1 - EXPECTED) * squares)


def _waves(count: int, workers: int) -> int:
    """How many candidates a worker scores one after the other, where so many are scored at once."""
    return math.ceil(max(0, count) / workers)


def _share(experiment: Experiment) -> float:
    """The share of this machine's processor, or of a GPU, that a worker has here. On a cluster, a worker's machine is
    taken to be like this one.
    """
    engine = experiment.config.engine
    if torch.cuda.is_available() and engine.device != "cpu":
        return min(1.0, engine.gpus or 1.0)
    return 1.0 if engine.on == "ray" else 1.0 / experiment.worker_count


def first_prompt(experiment: Experiment) -> FirstPrompt | None:
    """Return the first prompt, with scores of 0; None where the optimizer has no LLM or the budget ends before it."""
    if not experiment.asks:
        return None
    zeros = {name: {metric: 0.0} for name, (_, metric) in experiment.config.counted.items()}
    optimizer = experiment.optimizer()
    asking = optimizer.ask_start(experiment.start_rows)
    try:
        return FirstPrompt(next(asking), 0)
    except StopIteration:
        pass  # it asks after the first scores
    finally:
        asking.close()
    candidates = [Candidate(i, 0, s.origin, s.genes, s.note) for i, s in enumerate(experiment.start_rows)]
    # As in the run, parents that are no points of the space are not told.
    told = [each for each in candidates if optimizer.learns_paths or each.lies_in(experiment.space)]
    count, known = len(candidates), list[Trial]()
    generation = 0
    while count < experiment.evaluations:
        generation += 1
        trials = [Trial(candidate, Score(0.0, 0.0, zeros, 0)) for candidate in told]
        optimizer.tell(trials)
        known += trials
        if experiment.config.objective.pareto:
            optimizer.retell(known, random_weights(experiment.config.objective, generation))
        asking = optimizer.ask(min(experiment.evaluations - count, population(experiment)))
        try:
            return FirstPrompt(next(asking), generation)
        except StopIteration as done:
            suggested: list[Suggestion] = done.value
        finally:
            asking.close()
        told = [
            Candidate(count + i, generation, s.origin, s.genes, s.note, path=s.path) for i, s in enumerate(suggested)
        ]
        count += len(told)
    return None


def unasked(experiment: Experiment, first: FirstPrompt | None) -> list[Finding]:
    """Return a warning where the optimizer asks an LLM and there is none, or the budget leaves no prompt for it."""
    if experiment.lacks_llm:
        return [
            Finding(
                "llm.proposer",
                "the search runs without an LLM, as llm-off does, for no key, base_url or model is given",
                "Give --api-key, or --base-url and --model; `llm: {proposer: local}` is a model on this machine",
            )
        ]
    if first or not experiment.asks:
        return []
    begun = len(experiment.start_rows)
    rest = max(0, experiment.evaluations - begun)
    share = ", fewer than make one for the LLM" if rest else ""
    instead = ", or take `optimizer: llm-off`, the same search without an LLM"
    return [
        Finding(
            "search.budget",
            f"the LLM will not be asked: {begun} of the {experiment.evaluations} evaluations are start"
            f" rows, which leaves {rest}{share}",
            f"Raise the budget{instead if experiment.config.search.optimizer == 'llm' else ''}",
        )
    ]


def _speed() -> float:
    """Floating-point operations a second of a bf16 matrix product on this machine, as the engine computes it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.ones(1024, 1024, dtype=torch.bfloat16, device=device)
    with fastest_products(a.device, a.dtype):
        float((a @ a)[0, 0])
        started, rounds = time.monotonic(), 20
        for _ in range(rounds):
            a = a @ a * 1e-3
        float(a[0, 0])
    return rounds * 2 * 1024**3 / (time.monotonic() - started)


@dataclass(frozen=True)
class Memory:
    """Memory needed and free, in bytes, without activations and the KV cache, which depend on the questions."""

    weights: int
    """The models' files, which are mapped: the system takes that memory back when it is short of it."""
    engine: int
    """The weights in the engine; of all workers that share this machine's main memory, or one GPU."""
    caches: int
    """The limit of `engine.cache_gb`, for every worker of this machine."""
    device: str
    """The device of the engine: `cpu` or `cuda`."""
    free: int | None
    """Main memory; None where the system does not tell."""
    device_free: int | None
    """Memory of the GPU; None without one."""
    disk: int
    """Temporary files of the self-check; 0 without it."""
    disk_free: int

    @property
    def needed(self) -> int:
        """Main memory, at least."""
        return self.caches + (self.engine if self.device == "cpu" else 0)


def memory_of(scorer: Scorer) -> Memory:
    """Return what a search takes, from the sizes of files and tensors; reads none of them."""
    config = scorer.config
    places = [folder for _, _, folder in folders(scorer)]
    places += [folder_of(reference.lora, scorer.root) for reference in names(scorer) if reference.lora]
    files = {file for place in places for file in place.glob("*.safetensors")}
    shapes = scorer.engine_model[1]
    bytes_each = torch.finfo(getattr(torch, config.genome.dtype)).bits // 8
    size = sum(math.prod(shape) for shape in shapes.values()) * bytes_each
    gpu = torch.cuda.is_available() and config.engine.device != "cpu"
    here = 1 if config.engine.on == "ray" else scorer.count_workers()
    together = int(1 / min(1.0, config.engine.gpus or 1.0)) if gpu else here  # on one GPU, or in main memory
    return Memory(
        weights=sum(file.stat().st_size for file in files),
        engine=size * together,
        caches=int(config.engine.cache_gb * GB) * here,
        device="cuda" if gpu else "cpu",
        free=_free_memory(),
        device_free=torch.cuda.mem_get_info()[0] if gpu else None,
        disk=size * here if config.engine.self_check else 0,
        disk_free=shutil.disk_usage(tempfile.gettempdir()).free,
    )


def memory(scorer: Scorer) -> Findings:
    """What does not fit into memory or on the disk; nothing where workers run on the machines of a cluster."""
    if scorer.config.engine.address not in (None, "none"):
        return
    of = memory_of(scorer)
    if of.free is not None and of.needed > of.free:
        yield Finding(
            "memory",
            f"the engine and its caches need {of.needed / GB:.1f} GB, {of.free / GB:.1f} GB are free",
            f"Lower engine.cache_gb ({scorer.config.engine.cache_gb:g}), choose a smaller genome.dtype, or free some",
        )
    elif of.free is not None and of.needed + of.weights > of.free:
        yield Finding(
            "memory",
            f"the models' {of.weights / GB:.1f} GB are more than the {(of.free - of.needed) / GB:.1f} GB that are left",
            "Every merge will read them from disk again; fewer models at a time are faster",
        )
    if of.device_free is not None and of.engine > of.device_free:
        yield Finding(
            "GPU",
            f"the engine's weights need {of.engine / GB:.1f} GB, {of.device_free / GB:.1f} GB are free",
            "Choose another with engine.device, a smaller genome.dtype, or several with vLLM's tensor_parallel_size",
        )
    if of.disk > of.disk_free:
        yield Finding(
            "disk",
            f"the self-check writes {of.disk / GB:.1f} GB to {tempfile.gettempdir()}, where {of.disk_free / GB:.1f} GB"
            " are free",
            "Set TMPDIR to a larger disk, or engine.self_check: false",
        )


def _free_memory() -> int | None:
    """Bytes of main memory that the machine, and the container's limit if there is one, have left."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    try:
        return min(free, int(limit.read_text()) - int(used.read_text()))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return free
