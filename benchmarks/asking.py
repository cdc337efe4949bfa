"""Answers to the prompts of optimizers."""

from llmevo.search.optimizers.base import Answer
from llmevo.search.prompts.question import Prompt, Reading
from llmevo.search.simulated_llm import SimulatedClient


def by(proposer: SimulatedClient | None) -> Answer:
    """The answers of a simulated LLM; without one every reply is empty."""
    return lambda prompt: prompt.read(proposer.answer(prompt).text) if proposer else Reading()


def refused(prompt: Prompt) -> Reading:
    """The answer where no LLM takes part. Raises SystemExit."""
    raise SystemExit(f"the optimizer asks an LLM in generation {prompt.generation}; none takes part here")
