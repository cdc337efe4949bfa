"""lm-eval's requests, answered by a live vLLM model."""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import postprocess_generated_text

from llmevo.engines.scoring.hf import DEFAULT_NEW_TOKENS, RequestScorer
from llmevo.engines.scoring.packing import Encoded

WANTED = 128
"""Tokens whose log-probability one request may ask for: vLLM's limit."""


class VllmScorer(RequestScorer):
    """The lm-eval model over a live vLLM model. Weights may change between calls if the prefix cache is reset.

    A log-likelihood is asked for step by step: each beginning of a text is a request for one token, which tells how
    likely the tokens are that follow this beginning in any continuation, and which token is the likeliest. Texts
    that begin alike, as the choices of a question do, share requests and the prefix cache. vLLM's `prompt_logprobs`
    does without that cache and computes all logits of the whole text, so only long continuations are asked that way.
    """

    def __init__(self, llm: Any, parameters: Any, tokenizer: Any, max_length: int, seed: int) -> None:
        """`parameters` is vLLM's class SamplingParams, `seed` is for generation that samples."""
        TemplateLM.__init__(self)
        self.llm, self.tokenizer, self.max_length, self.seed = llm, tokenizer, max_length, seed
        self._parameters = parameters
        self._tokens = cache(self._encode)  # the texts are the same for every candidate
        self._block: int = llm.llm_engine.vllm_config.cache_config.block_size

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        encoded = [self._fitted(place, context, rest) for place, (_, context, rest) in enumerate(requests)]
        short = [request for request in encoded if self._steps_are_cheaper(request)]
        long = [request for request in encoded if not self._steps_are_cheaper(request)]
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for request, tokens in [*self._by_steps(short), *self._by_prompts(long)]:
            results[request.place] = sum((score for score, _ in tokens), 0.0), all(greedy for _, greedy in tokens)
        return results

    def _steps_are_cheaper(self, request: Encoded) -> bool:
        """A step computes what is in no full block of the cache; a logit row costs about as much as a token."""
        extra = max(0, len(request.continuation) - 1)
        return extra * self._block / 2 < 2 * (len(request.context) + extra)

    def _by_steps(self, requests: Sequence[Encoded]) -> Iterator[tuple[Encoded, list[tuple[float, bool]]]]:
        """Each request with the log-probability of each of its tokens, and whether that is the likeliest token."""
        followers: dict[tuple[int, ...], dict[int, None]] = {}
        for request in requests:
            for beginning, token in _steps(request):
                followers.setdefault(beginning, {})[token] = None
        asked = [
            (beginning, [*tokens][start : start + WANTED])
            for beginning, tokens in sorted(followers.items())  # so that what begins alike is computed together
            for start in range(0, len(tokens), WANTED)
        ]
        found: dict[tuple[int, ...], dict[int, tuple[float, bool]]] = {}
        for (beginning, tokens), answer in zip(asked, self._ask(asked), strict=True):
            found.setdefault(beginning, {}).update((token, _next(answer, token)) for token in tokens)
        for request in requests:
            yield request, [found[beginning][token] for beginning, token in _steps(request)]

    def _by_prompts(self, requests: Sequence[Encoded]) -> Iterator[tuple[Encoded, list[tuple[float, bool]]]]:
        """The same, each request at once."""
        texts = [[*request.context, *request.continuation] for request in requests]
        answers = self._ask([(text[:-1], text[-1:]) for text in texts], prompt_logprobs=0)
        for request, text, answer in zip(requests, texts, answers, strict=True):
            start = len(request.context)
            rows = [row[token] for row, token in zip(answer.prompt_logprobs[start:], text[start:-1], strict=True)]
            yield request, [*((row.logprob, row.rank == 1) for row in rows), _next(answer, text[-1])]

    def _ask(self, asked: Sequence[tuple[Sequence[int], list[int]]], **options: Any) -> list[Any]:
        """One step from each beginning, with the log-probabilities of the wanted tokens."""
        options = {"temperature": 0.0, "max_tokens": 1, "detokenize": False, **options}
        return self._generate_all(
            [beginning for beginning, _ in asked],
            [self._parameters(logprob_token_ids=wanted, **options) for _, wanted in asked],
        )

    def _generate_all(self, prompts: Sequence[Sequence[int]], parameters: list[Any]) -> list[Any]:
        inputs = [{"prompt_token_ids": [*prompt]} for prompt in prompts]
        return self.llm.generate(inputs, parameters, use_tqdm=False) if inputs else []

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        prompts: list[list[int]] = []
        parameters: list[Any] = []
        stops: list[list[str]] = []
        for context, options in (request.args for request in requests):
            until = options.get("until") or []
            stops.append([until] if isinstance(until, str) else [*until])
            room = int(options.get("max_gen_toks") or options.get("max_new_tokens") or DEFAULT_NEW_TOKENS)
            prompts.append(self.tok_encode(context)[-max(1, self.max_length - room) :])
            chosen: dict[str, Any] = {"temperature": 0.0}
            if options.get("do_sample") or float(options.get("temperature") or 0.0) > 0:
                chosen = {key: options[key] for key in ("temperature", "top_p", "top_k") if key in options}
            # Special tokens stay in the text that vLLM looks for stop strings in, as a stop string may be one.
            fixed = {"max_tokens": room, "stop": stops[-1], "seed": self.seed, "skip_special_tokens": False}
            parameters.append(self._parameters(**fixed, **chosen))
        answers = self._generate_all(prompts, parameters)
        texts = [self.tokenizer.decode(answer.outputs[0].token_ids, skip_special_tokens=True) for answer in answers]
        return [postprocess_generated_text(text, stop, None) for text, stop in zip(texts, stops, strict=True)]


def _steps(request: Encoded) -> Iterator[tuple[tuple[int, ...], int]]:
    """Each token of the continuation after the beginning it follows."""
    for at, token in enumerate(request.continuation):
        yield (*request.context, *request.continuation[:at]), token


def _next(answer: Any, token: int) -> tuple[float, bool]:
    """The log-probability of a token as the next one, and whether it is the likeliest."""
    output = answer.outputs[0]
    return output.logprobs[0][token].logprob, output.token_ids[0] == token
