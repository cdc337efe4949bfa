"""What an optimizer asks for, its prompts answered on the way."""

from collections.abc import Callable

from llmevo.search.optimizers.base import Asking
from llmevo.search.prompts.question import Prompt, Reading
from llmevo.search.simulated_llm import SimulatedClient
from llmevo.search.trial import Suggestion

Answer = Callable[[Prompt], Reading]
"""What a prompt's reply proposes."""


def suggestions(asking: Asking, answer: Answer) -> list[Suggestion]:
    """Return what an optimizer asks for."""
    try:
        prompt = next(asking)
        while True:
            prompt = asking.send(answer(prompt))
    except StopIteration as done:
        return done.value


def by(proposer: SimulatedClient | None) -> Answer:
    """The answers of a simulated LLM; without one every reply is empty."""
    return lambda prompt: prompt.read(proposer.answer(prompt).text) if proposer else Reading()


def refused(prompt: Prompt) -> Reading:
    """The answer where no LLM takes part. Raises SystemExit."""
    raise SystemExit(f"the optimizer asks an LLM in generation {prompt.generation}; none takes part here")
