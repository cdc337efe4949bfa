"""Routers of mixtures that need a forward pass: of prompts, as mergekit-moe has them, and of a run's questions.

`gate_mode` of a mergekit-moe YAML says what the row of an expert is:

* `hidden` and `hidden_last`: mergekit's. The hidden state at the input of the layer, of the last token, the mean over
  the positive prompts minus that over the negative ones, with norm 1. `hidden_avg`: the mean over tokens.
* `cheap_embed`: mergekit's. The sum of the embeddings of the prompts' tokens, with norm 1, the same for all layers.
* `random`, `uniform_random`: mergekit's, for a training afterwards; here of a fixed seed.
* `inputs`: llmevo's. A regression on what the router sees, the state after the layer's second norm (`mixture.router`).
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from llmevo.engines.hf import HfEngine
from llmevo.evaluation.score import Score
from llmevo.merging.merger import Merger
from llmevo.merging.mixture.mergekit import Expert, MixtureRecipe
from llmevo.merging.mixture.router import RIDGE, Inputs, Router, fit
from llmevo.merging.recipe import Recipe
from llmevo.models.architecture import text_config
from llmevo.models.sources import Sources
from llmevo.run.calibration.activations import batches, layers_of, watched

SEED = 0
"""Of random rows."""

WORDS = "mixture: the texts for the router"
"""The texts in an error."""


def router_of(given: MixtureRecipe, sources: Sources, tokenizer: Path) -> Router:
    """Return the router of a mergekit-moe YAML. Raises SourceError where the base cannot be loaded."""
    config = text_config(sources.config(given.base_model))
    layers, hidden = sources.depth(given.base_model), int(config["hidden_size"])
    every = [*given.experts, *(of for of in given.shared_experts or [] if of.positive or "random" in given.gate_mode)]
    if given.gate_mode in ("random", "uniform_random"):
        drawn = torch.Generator().manual_seed(SEED)
        shape = (layers, len(every), hidden)
        rows = torch.randn(shape, generator=drawn)
        if given.gate_mode == "uniform_random":
            rows = (torch.rand(shape, generator=drawn) * 2 - 1) * hidden**-0.5
        return _split(rows, len(given.experts))
    dtype = "bfloat16" if given.gate_mode.startswith("hidden") else "float32"  # mergekit's
    engine = HfEngine(sources.engine_folder(given.base_model), tokenizer, dtype, None, Merger(sources))
    try:
        engine.swap(Recipe.of_one(given.base_model, dtype))
        if given.gate_mode == "inputs":
            return _of_inputs(engine, every, len(given.experts))
        states = _state_of(engine, given.gate_mode, layers)
        return _split(
            torch.stack([_direction(expert, states) for expert in every], 1).float().cpu(), len(given.experts)
        )
    finally:
        engine.close()


def _split(rows: Tensor, experts: int) -> Router:
    """Return the router of (layers, experts and perhaps the shared one, hidden)."""
    return Router(
        rows[:, :experts].contiguous(), None, rows[:, experts].contiguous() if rows.shape[1] > experts else None
    )


def _direction(expert: Expert, states: Callable[[list[str]], Tensor]) -> Tensor:
    found = states(expert.positive)
    if expert.negative:
        found = found - states(expert.negative)
    return found / found.norm(p=2, dim=-1, keepdim=True).clamp(min=1e-8)


def _state_of(engine: HfEngine, mode: str, layers: int) -> Callable[[list[str]], Tensor]:
    """Return mergekit's function of prompts: (layers, hidden), its arithmetic step by step for the same bits."""
    tokenizer, model = engine.lm.tokenizer, engine.model
    tokenizer.padding_side = "left"
    tokenizer.pad_token_id = tokenizer.bos_token_id
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token

    @torch.no_grad()
    def states(prompts: list[str]) -> Tensor:
        texts = [(tokenizer.bos_token or "") + prompt for prompt in prompts]
        tokens = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(engine.device)
        if mode == "cheap_embed":
            weight = model.get_input_embeddings().weight.float()
            one_hot = torch.nn.functional.one_hot(tokens["input_ids"], num_classes=len(weight))
            embedded = ((one_hot.float() @ weight) * tokens["attention_mask"].unsqueeze(-1)).sum(dim=1)
            total = embedded.sum(dim=0, keepdim=True)
            return (total / total.norm(dim=-1, keepdim=True).clamp(min=1e-8)).repeat(layers, 1)
        output = model(**tokens, output_hidden_states=True, return_dict=True)
        hidden = torch.stack(output.hidden_states[:-1])
        hidden = hidden.sum(dim=2) / hidden.shape[2] if mode == "hidden_avg" else hidden[:, :, -1, :]
        return hidden.sum(dim=1) / hidden.shape[1]

    return states


def _of_inputs(engine: HfEngine, experts: Sequence[Expert], routed: int) -> Router:
    """Return the regression of each prompt's expert, 1 or -1 for a negative prompt, on the inputs of the routers."""
    texts = [text for expert in experts for text in (*expert.positive, *expert.negative)]
    scores = torch.zeros(len(texts), len(experts))
    row = 0
    for place, expert in enumerate(experts):
        for sign, count in ((1.0, len(expert.positive)), (-1.0, len(expert.negative))):
            scores[row : row + count, place] = sign
            row += count
    router = fit(inputs_of(engine, texts), scores)
    shared = router.directions[:, routed].contiguous() if len(experts) > routed else None
    return Router(router.directions[:, :routed].contiguous(), router.means, shared)


def expert_scores(
    scores: Sequence[Score],
    counts: Mapping[str, int],
    weights: Mapping[str, float],
    counted: Mapping[str, tuple[float, str]],
) -> Tensor:
    """Return the experts' scores on each question, (questions, experts), task by task.

    `counts` are the questions of each task. A task whose metric is no mean over questions gives its value to all.
    Where lower is better, by a negative weight, the sign changes.
    """
    columns: list[list[float]] = []
    for score in scores:
        column: list[float] = []
        for task, count in counts.items():
            own = score.item_scores.get(task)
            values = [*own] if own is not None and len(own) == count else [score.tasks[task][counted[task][1]]] * count
            column += [value if weights.get(task, 1.0) >= 0 else -value for value in values]
        columns.append(column)
    return torch.tensor(columns).T


def fitted(
    dense: Recipe, scores: Tensor, texts: Sequence[str], sources: Sources, tokenizer: Path, device: str | None = None
) -> Router:
    """Return routers fitted on questions: `scores` are those of the experts, (questions, experts).

    `dense` is the model whose states the routers see, such as the uniform merge. Raises SourceError, TaskError.
    """
    folder = sources.engine_folder(dense.donor)
    engine = HfEngine(folder, tokenizer, "float32", device, Merger(sources))
    try:
        engine.swap(dense.model_copy(update={"dtype": "float32"}))
        return fit(inputs_of(engine, texts), scores, RIDGE)
    finally:
        engine.close()


@torch.no_grad()
def inputs_of(engine: HfEngine, texts: Sequence[str]) -> list[Inputs]:
    """Return the sums over what the routers of each layer would see of the texts, in a dense model."""
    found: list[Inputs] = []
    layers = layers_of(engine.model)
    place = [0]
    groups = batches(engine, texts, WORDS)

    def add(layer: int, given: Tensor) -> None:
        rows = given.detach().double().cpu()  # (texts, tokens, hidden)
        if len(found) == layer:
            hidden = rows.shape[-1]
            zeros = torch.zeros(len(texts), hidden, dtype=torch.float64)
            found.append(Inputs(torch.zeros(hidden, hidden).double(), zeros, torch.zeros(len(texts)).double()))
        flat, own = rows.reshape(-1, rows.shape[-1]), groups[place[0]][0]
        found[layer].gram.addmm_(flat.T, flat)
        found[layer].sums[own] += rows.sum(1)
        found[layer].tokens[own] += rows.shape[1]

    with watched({number: layer.mlp for number, layer in enumerate(layers)}, add):
        for place[0], (_, tokens) in enumerate(groups):
            engine.lm.read(tokens)
    return found
