"""Tokenizers: whether the models mean the same by a token, end their answers alike and are asked alike."""

from pathlib import Path
from typing import Any

from llmevo.errors import plural
from llmevo.models.checkpoints import read_object
from llmevo.models.tokenizer import load_tokenizer, template_of, vocabulary
from llmevo.run.preflight.base import Finding, Findings, folders, tokenizer_donor
from llmevo.run.scorer import Scorer

SHOWN = 3
"""Tokens that are named of those that differ."""


DESCRIPTION = "A description of a task."
"""What templates are tried with."""


KINDS = ("bos", "eos", "pad")


def vocabularies(scorer: Scorer) -> Findings:
    """Tokens that have another number in another model: their embeddings would be mixed up."""
    donor, folder = tokenizer_donor(scorer)
    wanted = vocabulary(folder)
    for name, _, other in folders(scorer):
        found = wanted if other == folder else vocabulary(other)
        if not found:
            yield Finding(
                name,
                "it has no tokenizer, so whether a token means the same in it cannot be checked",
                "Put the files of its tokenizer beside its weights",
            )
        tokens = {token: min(number, found.get(token, number)) for token, number in wanted.items() ^ found.items()}
        if tokens and found:
            first = sorted(tokens, key=lambda token: (tokens[token], token))[:SHOWN]
            listed = ", ".join(f"{t!r} ({found.get(t, 'none')}, there {wanted.get(t, 'none')})" for t in first)
            more = f" and {len(tokens) - SHOWN} more" if len(tokens) > SHOWN else ""
            yield Finding(
                name,
                f"{plural(len(tokens), 'token differs', 'tokens differ')} from those of {donor}: {listed}{more}",
                "Rows of the embeddings are merged by number: align the vocabularies first, or leave the model out"
                " unless the tokens are never used",
            )


def special_tokens(scorer: Scorer) -> Findings:
    """Beginning, end and padding: a model that ends its answers with another token may never stop."""
    donor, folder = tokenizer_donor(scorer)
    wanted = _special(folder)
    for name, _, other in folders(scorer):
        found = _special(other)
        differing = [key for key in wanted if key in found and found[key] != wanted[key]]
        if differing:
            yield Finding(
                name,
                ", ".join(f"{key} is {found[key]!r}, that of {donor} {wanted[key]!r}" for key in differing),
                f"Candidates end their answers as {donor} does; name another model as genome.tokenizer_source if"
                " most were tuned on its tokens",
            )


def chat_templates(scorer: Scorer) -> Findings:
    """Questions are asked in the donor's template: of no use to a model that was tuned on another, or on none."""
    if not scorer.config.apply_chat_template:
        return
    donor, folder = tokenizer_donor(scorer)
    wanted = template_of(folder)
    others = {name: template_of(other) for name, _, other in folders(scorer) if other != folder}
    if wanted is None:
        having = [name for name, template in others.items() if template]
        source = f", or genome.tokenizer_source: a model with one ({', '.join(having)})" if having else ""
        yield Finding(
            donor,
            "it has no chat template, and apply_chat_template is true",
            f"Set apply_chat_template: false{source}",
        )
        return
    for name, template in others.items():
        if template != wanted:
            yield Finding(
                name,
                f"its chat template is not that of {donor}, in which all candidates are asked"
                if template
                else f"it has no chat template, and all candidates are asked in that of {donor}",
                "Set apply_chat_template: false to ask in none, or genome.tokenizer_source to choose another model's",
            )


def system_messages(scorer: Scorer) -> Findings:
    """Chat templates that refuse a system message, which is what a task's description is sent as, or leave it out."""
    described = {task: None for evaluator in scorer.evaluators.values() for task in evaluator.described}
    donor, folder = tokenizer_donor(scorer)
    if not scorer.config.apply_chat_template or not described or template_of(folder) is None:
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
            "Nothing is to be done, unless scores are compared with lm-eval's own: then take `description` out of the"
            " task",
        )
        return
    if DESCRIPTION not in text:
        yield Finding(
            donor,
            f"its chat template leaves system messages out, so the model does not see the description of {tasks}",
            "Write it into the task's doc_to_text if the model needs it",
        )


def _special(folder: Path) -> dict[str, Any]:
    """What a model's files say of its special tokens; only what is given."""
    found: dict[str, Any] = {}
    for file, suffix, label in (
        ("tokenizer_config.json", "token", ""),
        ("config.json", "token_id", ""),
        ("generation_config.json", "token_id", "generation "),
    ):
        content = read_object(folder / file) if (folder / file).exists() else {}
        for kind in KINDS:
            value = content.get(f"{kind}_{suffix}")
            value = value.get("content") if isinstance(value, dict) else value
            if value is not None:
                found[f"{label}{kind}_{suffix}"] = value
    return found
