"""A tiny random Llama and a character-level tokenizer, made in code: what the engines and proposers are tried on."""

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<pad>", "<s>", "</s>")
LETTERS = "\n " + "".join(chr(code) for code in range(33, 127))
POSITIONS = 64
"""Tokens the model holds: few, so that long texts are cut in the tests."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_tokenizer(begin: bool = False) -> PreTrainedTokenizerFast:
    """One token a character. With `begin`, every text starts with `<s>`, as Llama's tokenizer has it."""
    vocabulary = {token: place for place, token in enumerate((*SPECIAL, *LETTERS))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def tiny_llama(seed: int = 0, tied: bool = False, **changes: Any) -> LlamaForCausalLM:
    """Random weights, large enough that the likeliest token is far ahead of the second."""
    options: dict[str, Any] = {
        "vocab_size": len(SPECIAL) + len(LETTERS),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.4,
        "tie_word_embeddings": tied,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 3,
        **changes,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**options)).eval()


def save_tiny(folder: Path, seed: int = 0, tied: bool = False, **changes: Any) -> Path:
    """Such a model and its tokenizer in the Hugging Face format."""
    tiny_llama(seed, tied, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def text(seed: int, length: int) -> str:
    """Random characters; the same for the same seed."""
    return "".join(random.Random(seed).choices("abc 012\n?", k=length))
