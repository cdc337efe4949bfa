"""LLM-Evo-Merge (https://github.com/kwon13/LLM-Evo-Merge) as a baseline: the LLM gives a mean, mutations are scored.

The first generation is random; then the LLM is shown the four best of the last generation, in one conversation, and
answers with the mean of the next. The step size is 0.05 after a generation that improved on the best so far, else 0.2.
Neither the best recipe nor the start rows are kept. Where the original stops with an error (a failed merge, an answer
without JSON or keys, a lost server), this continues with the mean of the four best.
"""

import math
from collections.abc import Generator, Sequence

import numpy as np

from llmevo.llm.json import numeral, objects, scalars, without_surrogates
from llmevo.search.optimizers.base import Asking, Optimizer, Setup, digest
from llmevo.search.prompts.question import Prompt, Reading
from llmevo.search.space import Array, Genes, SearchSpace
from llmevo.search.trial import Suggestion, Trial

SIGMA_LOW, SIGMA_HIGH = 0.05, 0.2  # step sizes after a generation with an improvement, and after one without
TOP = 4  # candidates of the last generation that are shown
TRIES = 3  # answers until one has the right dimensions
EXCHANGES = 10  # earlier prompts and answers that are sent again: all of the original's ten generations
LONGEST = 8000  # characters of an answer that are sent again
MEANS = {"mean_genome", "next_mean_genome"}  # keys of the mean: the original's prompt uses both
SCHEMA = {
    "type": "object",
    "properties": {"thought": {"type": "string"}, "mean_genome": {"type": "array", "items": {}}},
    "required": ["thought", "mean_genome"],
    "additionalProperties": False,
}


class LlmEvoMerge(Optimizer):
    """The LLM's mean and Gaussian mutations of it. Use it as a baseline only."""

    files = ("llm_evo_merge_system.j2", "llm_evo_merge_user.j2", "llm_evo_merge_again.j2")
    """Its prompt templates."""

    def __init__(self, setup: Setup) -> None:
        self._setup, self._space = setup, setup.space
        self._random = np.random.default_rng(setup.seed)
        self._size = 4 + round(3 * math.log(len(setup.space.genes)))
        self._dimensions = dimensions(setup.space)
        self._number = 0
        self._sigma: float | None = None
        self._best = -math.inf
        self._waiting: list[Array] = []
        self._last: list[Trial] = []
        self._said: list[dict[str, str]] = []

    @property
    def sigma(self) -> float | None:
        return self._sigma

    def ask(self, size: int) -> Asking:
        if not self._waiting:
            self._waiting = yield from self._generation()
            self._last = []
            self._number += 1
        handed, self._waiting = self._waiting[:size], self._waiting[size:]
        origin = "random" if self._sigma is None else "gaussian"
        note = "" if self._sigma is None else "mutation of the LLM's mean"
        return [Suggestion(self._space.from_unit(point), origin, note) for point in handed]

    def _generation(self) -> Generator[Prompt, Reading, list[Array]]:
        scored = sorted((trial for trial in self._last if trial.score), key=lambda trial: -trial.value)
        if not scored:
            self._sigma = None
            return [*self._random.random((self._size, len(self._space.genes)))]
        improved = scored[0].value > self._best
        self._best = max(self._best, scored[0].value)
        self._sigma = SIGMA_LOW if improved else SIGMA_HIGH
        mean = yield from self._mean(scored[:TOP])
        steps = self._random.normal(0.0, self._sigma, (self._size, len(mean)))
        return [*np.clip(mean + steps, 0.0, 1.0)]

    def _mean(self, top: Sequence[Trial]) -> Generator[Prompt, Reading, Array]:
        """The LLM's answer; the mean of the best where none is usable."""
        seed = int(self._random.integers(2**31))
        render = self._setup.templates.render
        shown = {
            "dimensions": self._dimensions,
            "rows": self._rows(top),
            "best": self._best,
            "generation": self._number,
        }
        system = {"role": "system", "content": render(self.files[0], **shown)}
        self._said = self._said[-2 * EXCHANGES :]
        self._said.append({"role": "user", "content": render(self.files[1], **shown)})
        for attempt in range(TRIES):
            reading = yield self._prompt((system, *self._said), seed + attempt)
            if reading.text:
                self._said.append({"role": "assistant", "content": reading.text})
            else:
                self._said.pop()  # questions and answers alternate
            if reading.proposals:
                return self._space.to_unit(reading.proposals[0].genes)
            if not reading.text:
                break  # the caller has retried already
            if attempt + 1 < TRIES:
                again = render(self.files[2], problem="; ".join(reading.problems)[:500])
                self._said.append({"role": "user", "content": again})
        return np.mean([self._space.to_unit(trial.candidate.genes) for trial in top], axis=0)

    def _rows(self, top: Sequence[Trial]) -> list[dict[str, object]]:
        """The best first, each with its place in the generation; truncated to hundredths."""
        places = {trial.candidate.id: place for place, trial in enumerate(self._last, start=1)}
        return [
            {
                "fitness_score": trial.value,
                f"genome_{places[trial.candidate.id]}": self._shaped(self._space.to_unit(trial.candidate.genes)),
            }
            for trial in top
        ]

    def _shaped(self, point: Array) -> object:
        return (point * 100).astype(int).reshape(self._dimensions).tolist()

    def _prompt(self, messages: tuple[dict[str, str], ...], seed: int) -> Prompt:
        if self._setup.style != "completion":
            return Prompt(messages, read=self._read, schema=SCHEMA, generation=self._number, seed=seed)
        # A base model continues the text with digits.
        text = "\n".join(message["content"] for message in messages) + '\n{"mean_genome": '
        integers = len(self._space.genes)
        message = {"role": "user", "content": text}
        return Prompt((message,), read=self._read, integers=integers, digits=2, generation=self._number, seed=seed)

    def _read(self, text: str) -> Reading:
        """The mean in an answer: nested lists of any shape with the right count of numbers."""
        kept = without_surrogates(text[:LONGEST]) or " "
        answer = next((found for found in reversed(objects(text)) if MEANS & found.keys()), None)
        if answer is None and self._setup.style == "completion":
            answer = {"mean_genome": text[:LONGEST].split()}
        if answer is None:
            return Reading(problems=["the answer holds no JSON object with the key mean_genome"], text=kept)
        values = [*scalars(next(answer[key] for key in sorted(MEANS) if key in answer))]
        try:
            numbers = [numeral(value) for value in values]
            if len(numbers) != len(self._space.genes):
                raise ValueError(f"it has {len(numbers)} numbers, {len(self._space.genes)} are wanted")
        except ValueError as error:
            return Reading(problems=[f"mean_genome: {error}"], text=kept)
        thought = without_surrogates(str(answer.get("thought", "")))[:600]
        mean = self._space.from_unit(np.clip(np.array(numbers) / 100, 0.0, 1.0))
        return Reading([Suggestion(mean, "llm", "", "mean")], thought, text=kept)

    def tell(self, trials: Sequence[Trial]) -> None:
        if self._number:  # the original has no start rows
            self._last += trials

    def state(self) -> str:
        told: list[tuple[float, Genes]] = [(trial.value, trial.candidate.genes) for trial in self._last]
        waiting = [point.tolist() for point in self._waiting]
        return digest(self._random, self._number, self._sigma, self._best, told, waiting, self._said)


def dimensions(space: SearchSpace) -> tuple[int, ...]:
    """Return (slices, models, filters, parameters), or one number where the genes fill no such box."""
    models, parameters = {gene.model for gene in space.genes}, {gene.parameter for gene in space.genes}
    box = len(space.slices), len(models), len(space.filters), len(parameters)
    whole = math.prod(box) == len(space.genes) and None not in models and not any(gene.choices for gene in space.genes)
    return box if whole else (len(space.genes),)
