"""What mergekit-evolve and LLM-Evo-Merge call things that have another name here, or none."""

from collections.abc import Sequence

from llmevo.errors import UserError

STEP = "leave it out: the optimizers set their step size themselves (`search.sigma_rule` says how `llm` does)"
GPUS = "`engine.options` of the config, such as `engine: {backend: vllm, options: {tensor_parallel_size: 2}}`"
BITS = "leave it out: candidates are scored in the type of `genome.dtype`, as they are exported"
MEMORY = "leave it out: candidates are always merged in memory"
BATCH = "leave it out: the engine sets its batches by the memory that is free"
JOBS = "leave it out: one engine merges and scores all candidates, and nothing is scheduled"

NAMES = {
    "max-fevals": ("--budget", "search.budget"),
    "max-generation": ("--budget, in candidates", "search.budget, in candidates"),
    "max-generations": ("--budget, in candidates", "search.budget, in candidates"),
    "popsize": ("`search.population` of the config", "search.population"),
    "population-size": ("`search.population` of the config", "search.population"),
    "force-population-size": ("`search.population` of the config", "search.population"),
    "sigma0": (STEP, STEP),
    "sigma-low": (STEP, STEP),
    "sigma-high": (STEP, STEP),
    "random-seed": ("--seed", "search.seed"),
    "storage-path": ("--out", "the option --out of `llmevo run`"),
    "vllm": ("--backend vllm", "`engine: {backend: vllm}`"),
    "no-vllm": ("--backend hf", "`engine: {backend: hf}`"),
    "strategy": (JOBS, JOBS),
    "num-gpus": (GPUS, GPUS),
    "in-memory": (MEMORY, MEMORY),
    "no-in-memory": (MEMORY, MEMORY),
    "merge-cuda": ("`engine.device` of the config", "engine.device"),
    "no-merge-cuda": ("`engine: {device: cpu}` in the config", "`engine: {device: cpu}`"),
    "batch-size": (BATCH, BATCH),
    "load-in-8bit": (BITS, BITS),
    "load-in-4bit": (BITS, BITS),
    "timeout": ('--budget "30 min"', "search.budget, such as `30 min`"),
    "trust-remote-code": ("leave it out: code beside a model is not run",) * 2,
    "wandb": ("--logger wandb", "`loggers: [wandb]`"),
    "no-wandb": ("leave it out: wandb is told only with --logger wandb",) * 2,
    "wandb-project": (
        "`loggers: [{name: wandb, project: NAME}]` in the config",
        "`loggers: [{name: wandb, project: …}]`",
    ),
    "wandb-entity": ("`loggers: [{name: wandb, entity: NAME}]` in the config", "`loggers: [{name: wandb, entity: …}]`"),
    "i-understand-the-depths-of-the-evils-i-am-unleashing": (
        "`allow_benchmark_tasks: true` in the config",
        "allow_benchmark_tasks",
    ),
    "save-final-model": ("`llmevo export RUN OUT` after the run",) * 2,
    "no-save-final-model": ("leave it out: `llmevo export` writes the model",) * 2,
    "reshard": (MEMORY, MEMORY),
    "no-reshard": (MEMORY, MEMORY),
    "allow-crimes": ("leave it out: the models of a merge need one architecture",) * 2,
    "no-allow-crimes": ("leave it out",) * 2,
    "llm-model": ("--model", "llm.model"),
    "max-retries": ("`llm.retries` of the config", "llm.retries"),
}
"""{its name there: (what to write on the command line, what to write in the config)}."""


def check_options(words: Sequence[str]) -> None:
    """Raise UserError for an option of the other tools on the command line, with what to write instead."""
    for word in words:
        name = word.partition("=")[0]
        if name.startswith("--") and (ways := NAMES.get(name.removeprefix("--").replace("_", "-"))):
            raise UserError(f"{name}: there is no such option here; {_advice(ways[0])}")


def key_hint(key: str) -> str:
    """What to write instead of a key that is an option of the other tools; empty for any other."""
    ways = NAMES.get(key.replace("_", "-"))
    return f"; {_advice(ways[1])}" if ways else ""


def _advice(way: str) -> str:
    return way if way.startswith("leave") else f"use {way}"
