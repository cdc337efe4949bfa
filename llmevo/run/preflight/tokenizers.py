"""Checks of the tokenizers: vocabularies, special tokens and chat templates."""

from pathlib import Path
from typing import Any

from llmevo.errors import plural
from llmevo.models.checkpoints import read_object
from llmevo.models.tokenizer import load_tokenizer, template_of, vocabulary
from llmevo.run.preflight.base import Finding, Findings, folders, tokenizer_donor
from llmevo.run.scorer import Scorer

SHOWN = 3
"""Differing tokens that a warning names."""

DESCRIPTION = "A description of a task."
"""The system message that templates are tried with."""


def vocabularies(scorer: Scorer) -> Findings:
    """Tokens with another id in another model: their embeddings would be mixed up."""
    donor, folder = tokenizer_donor(scorer)
    wanted = vocabulary(folder)
    for name, _, other in folders(scorer):
        found = wanted if other == folder else vocabulary(other)
        if not found:
            yield Finding(
                name,
                "it has no tokenizer, so whether a token means the same in it cannot be checked",
                "Put the files of its tokenizer into its folder",
            )
        if scorer.vocabulary:  # by token, numbers do not matter
            continue
        tokens = {token: min(number, found.get(token, number)) for token, number in wanted.items() ^ found.items()}
        if tokens and found:
            first = sorted(tokens, key=lambda token: (tokens[token], token))[:SHOWN]
            listed = ", ".join(f"{t!r} ({found.get(t, 'none')}, there {wanted.get(t, 'none')})" for t in first)
            more = f" and {len(tokens) - SHOWN} more" if len(tokens) > SHOWN else ""
            yield Finding(
                name,
                f"{plural(len(tokens), 'token differs', 'tokens differ')} from those of {donor}: {listed}{more}",
                "Rows of the embeddings are merged by number: set genome.tokenizer_source: union to merge them by"
                " token, or leave the model out unless the tokens are never used",
            )


def special_tokens(scorer: Scorer) -> Findings:
    """Tokens for beginning, end and padding: a model that ends its answers with another token may never stop."""
    donor, folder = tokenizer_donor(scorer)
    wanted = _special_tokens(folder)
    for name, _, other in folders(scorer):
        found = _special_tokens(other)
        differing = [key for key in wanted if key in found and found[key] != wanted[key]]
        if differing:
            yield Finding(
                name,
                ", ".join(f"{key} is {found[key]!r}, that of {donor} {wanted[key]!r}" for key in differing),
                f"Candidates end their answers as {donor} does; name another model as genome.tokenizer_source if"
                " most were tuned on its tokens",
            )


def chat_templates(scorer: Scorer) -> Findings:
    """Templates that differ from the donor's, which all candidates get."""
    if not scorer.config.apply_chat_template:
        return
    donor, folder = tokenizer_donor(scorer)
    wanted = template_of(folder)
    others = {name: template_of(other) for name, _, other in folders(scorer) if other != folder}
    for name, template in others.items():
        if template != wanted:
            yield Finding(
                name,
                f"its chat template is not that of {donor}, which all candidates get"
                if template
                else f"it has no chat template, and all candidates get that of {donor}",
                "Set apply_chat_template: false, or genome.tokenizer_source to choose another model's",
            )


def system_messages(scorer: Scorer) -> Findings:
    """Chat templates that refuse or leave out a system message, as which a task's description is sent."""
    described = {task: None for evaluator in scorer.evaluators.values() for task in evaluator.described}
    donor, folder = tokenizer_donor(scorer)
    if not scorer.config.apply_chat_template or not described:
        return
    from jinja2 import TemplateError

    tokenizer = load_tokenizer(folder)
    tasks = ", ".join(described)
    try:
        text: str = tokenizer.apply_chat_template(
            [{"role": "system", "content": DESCRIPTION}, {"role": "user", "content": "?"}], tokenize=False
        )
    except TemplateError:
        yield Finding(
            donor,
            f"its chat template refuses a system message, so the description of {tasks} begins the first user message"
            " (lm-eval leaves it out)",
            "Take `description` out of the task only if scores are compared with lm-eval's own",
        )
        return
    if DESCRIPTION not in text:
        yield Finding(
            donor,
            f"its chat template leaves system messages out, so the model does not see the description of {tasks}",
            "Write it into the task's doc_to_text if the model needs it",
        )


def _special_tokens(folder: Path) -> dict[str, Any]:
    """The special tokens and their ids that a model's files give."""
    found: dict[str, Any] = {}
    for file, suffix, label in (
        ("tokenizer_config.json", "token", ""),
        ("config.json", "token_id", ""),
        ("generation_config.json", "token_id", "generation "),
    ):
        content = read_object(folder / file) if (folder / file).exists() else {}
        for kind in ("bos", "eos", "pad"):
            value = content.get(f"{kind}_{suffix}")
            value = value.get("content") if isinstance(value, dict) else value
            if value is not None:
                found[f"{label}{kind}_{suffix}"] = value
    return found
