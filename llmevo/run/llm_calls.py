"""Calls to the LLM during a search: every prompt and reply is logged; the number of calls and their cost are capped."""

import time
from dataclasses import replace

from llmevo.config import Llm
from llmevo.errors import ProposerError, RequestRefused, machine_error, plural
from llmevo.llm.client import LETTERS
from llmevo.llm.json import without_thoughts
from llmevo.llm.templates import Templates
from llmevo.run.experiment import Experiment
from llmevo.run.log import events
from llmevo.run.log.journal import Journal
from llmevo.run.log.state import RunState
from llmevo.search.prompts.chat import tokens
from llmevo.search.prompts.question import Messages, Prompt, Reading

QUOTED, QUOTED_SHORT = 1000, 300
"""Tokens of an unreadable answer that are shown to the LLM again, and of one in the short form."""


def answer(experiment: Experiment, journal: Journal, prompt: Prompt) -> Reading:
    """Return the LLM's answer to a prompt, from the log or from a call. An LLM that cannot be reached is an empty
    answer with its reason.

    A readable answer is asked for once more where the first one has no usable proposal, with its problems named.
    """
    event, reading = _turn(experiment, journal, prompt)
    if event.reply is None or not _is_worth_repairing(experiment.config.llm, journal.state, prompt, reading):
        return reading
    return _turn(experiment, journal, repaired(prompt, event.reply, reading, experiment.templates), repair=True)[1]


def is_repairable(prompt: Prompt, reading: Reading) -> bool:
    """Return whether an answer says nothing of use, so that a second one may.

    Integers held to a grammar are always readable, and `llm-evo-merge` asks again by itself.
    """
    usable = reading.proposals or reading.beliefs or reading.hypotheses
    return prompt.question is not None and not prompt.integers and not usable


def repaired(prompt: Prompt, reply: str, reading: Reading, templates: Templates) -> Prompt:
    """Return the prompt that asks once more, with the reply and its problems."""
    problems = "; ".join(reading.problems[:5])
    said = _beginning(without_thoughts(reply), QUOTED_SHORT if prompt.question and prompt.question.short else QUOTED)

    def messages() -> list[dict[str, str]]:
        again = templates.render("repair.j2", problems=problems)
        return [*prompt.messages, {"role": "assistant", "content": said}, {"role": "user", "content": again}]

    return replace(prompt, messages=Messages(messages))


def _beginning(text: str, most: int) -> str:
    """Return as much of a text as has at most so many tokens; for nothing `(no answer)`, as servers want some text."""
    text = text.strip()[: LETTERS * most]
    while tokens(text) > most:
        text = text[: len(text) * 3 // 4]
    return text or "(no answer)"


def _turn(
    experiment: Experiment, journal: Journal, prompt: Prompt, repair: bool = False
) -> tuple[events.Prompted, Reading]:
    event = journal.once(events.Prompted, lambda: _call(experiment, journal.state, prompt, repair))
    lost = Reading(problems=[*event.problems], lost=bool(event.calls))
    return event, lost if event.reply is None else prompt.read(event.reply)


def _is_worth_repairing(llm: Llm, state: RunState, prompt: Prompt, reading: Reading) -> bool:
    """Whether to ask again: within the caps, and until a repair has failed once."""
    failed = any(event.repair and not event.used for event in state.prompted)
    return is_repairable(prompt, reading) and not (failed or capped(llm, state))


def _call(experiment: Experiment, state: RunState, prompt: Prompt, repair: bool) -> events.Prompted:
    """Ask the LLM. Raises ProposerRefused where its server refuses the key or the first request, and where `llm.strict`
    is set every error of the LLM.
    """
    started, reply, reading = time.monotonic(), None, Reading()
    cap = capped(experiment.config.llm, state)
    try:
        if cap:
            raise ProposerError(cap)
        reply = experiment.proposer.answer(prompt)
        reading = prompt.read(reply.text)
    except (ProposerError, RequestRefused) as error:
        is_first = not any(event.reply is not None for event in state.prompted)
        if (experiment.config.llm.strict and not cap) or (isinstance(error, RequestRefused) and is_first):
            raise
        reading.problems.append(str(error))
    except Exception as error:
        if found := machine_error(error):  # a local LLM, for which a GPU has no memory left
            raise found from error
        raise
    return events.Prompted(
        generation=prompt.generation,
        model=reply.model if reply else experiment.proposer.model,
        style=experiment.proposer.style,
        messages=[] if cap else [*prompt.messages],
        reply=reply.text if reply else None,
        tokens={
            "prompt": reply.prompt_tokens if reply else 0,
            "completion": reply.completion_tokens if reply else 0,
        },
        cost=reply.cost if reply else 0.0,
        seconds=round(time.monotonic() - started, 3),
        problems=[*(reply.problems if reply else ()), *reading.problems],
        analysis=reading.analysis,
        used=len(reading.proposals),
        calls=0 if cap else 1,
        repair=repair,
    )


def capped(llm: Llm, state: RunState) -> str:
    """Return why the LLM is no longer asked, empty while it is. Follows from the log alone."""
    calls, costs = sum(event.calls for event in state.prompted), [event.cost for event in state.prompted]
    if llm.max_calls is not None and calls >= llm.max_calls:
        return f"not asked: llm.max_calls is reached ({plural(llm.max_calls, 'call')})"
    if llm.max_cost is not None and sum(costs) + max(costs, default=0.0) > llm.max_cost:
        return f"not asked: {sum(costs):.4g} of llm.max_cost {llm.max_cost:g} is spent, and one more call may exceed it"
    return ""
