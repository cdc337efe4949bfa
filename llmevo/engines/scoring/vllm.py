"""lm-eval's requests, answered by a live vLLM model."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval.models.utils import postprocess_generated_text

from llmevo.engines.scoring.base import Generation, TokenRequest, TokenScorer, check_numbers
from llmevo.engines.scoring.packing import Encoded
from llmevo.errors import TaskError

MAX_LOGPROBS = 128
"""Tokens whose log-probability one request may return: vLLM's limit."""


class VllmScorer(TokenScorer):
    """The lm-eval model over a live vLLM model. Weights may change between calls if the prefix cache is reset.

    A log-likelihood is computed step by step: each prefix of a text is a request for one token, which returns the
    log-probabilities of all tokens that follow this prefix in any continuation, and the likeliest token. Texts with a
    common prefix, such as the choices of a question, share requests and the prefix cache. vLLM's `prompt_logprobs`
    bypasses that cache and computes all logits of the text, so it is used for long continuations only.
    """

    def __init__(self, llm: Any, parameters: Any, tokenizer: Any, max_length: int, seed: int) -> None:
        """`parameters` is vLLM's class SamplingParams, `seed` is for generation that samples."""
        super().__init__(tokenizer, max_length)
        self.llm, self.seed = llm, seed
        self._parameters = parameters
        self._block: int = llm.llm_engine.vllm_config.cache_config.block_size

    def _loglikelihood_tokens(self, requests: list[TokenRequest], **_: Any) -> list[tuple[float, bool]]:
        short: list[Encoded] = []
        long: list[Encoded] = []
        for request in self._encoded(requests):
            # A step computes the tokens that fill no block of the cache; a row of logits costs as much as a token.
            extra = max(0, len(request.continuation) - 1)
            cheaper = extra * self._block / 2 < 2 * (len(request.context) + extra)
            (short if cheaper else long).append(request)
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for request, tokens in [*self._by_steps(short), *self._by_prompts(long)]:
            results[request.place] = sum((score for score, _ in tokens), 0.0), all(greedy for _, greedy in tokens)
        return results

    def _by_steps(self, requests: Sequence[Encoded]) -> Iterator[tuple[Encoded, list[tuple[float, bool]]]]:
        """Each request with the log-probability of each of its tokens, and whether that is the likeliest token."""
        followers: dict[tuple[int, ...], dict[int, None]] = {}
        for request in requests:
            for prefix, token in _steps(request):
                followers.setdefault(prefix, {})[token] = None
        steps = [
            (prefix, [*tokens][start : start + MAX_LOGPROBS])
            for prefix, tokens in sorted(followers.items())  # prefixes that share a beginning are computed together
            for start in range(0, len(tokens), MAX_LOGPROBS)
        ]
        found: dict[tuple[int, ...], dict[int, tuple[float, bool]]] = {}
        for (prefix, tokens), answer in zip(steps, self._next_tokens(steps), strict=True):
            found.setdefault(prefix, {}).update((token, _of_token(answer, token)) for token in tokens)
        for request in requests:
            yield request, [found[prefix][token] for prefix, token in _steps(request)]

    def _by_prompts(self, requests: Sequence[Encoded]) -> Iterator[tuple[Encoded, list[tuple[float, bool]]]]:
        """The same as `_by_steps`, with one request for each text."""
        texts = [[*request.context, *request.continuation] for request in requests]
        answers = self._next_tokens([(text[:-1], text[-1:]) for text in texts], prompt_logprobs=0)
        for request, text, answer in zip(requests, texts, answers, strict=True):
            start = len(request.context)
            rows = [row[token] for row, token in zip(answer.prompt_logprobs[start:], text[start:-1], strict=True)]
            yield request, [*((row.logprob, row.rank == 1) for row in rows), _of_token(answer, text[-1])]

    def _next_tokens(self, steps: Sequence[tuple[Sequence[int], list[int]]], **options: Any) -> list[Any]:
        """vLLM's outputs for one token after each prefix, with the log-probabilities of the given tokens."""
        options = {"temperature": 0.0, "max_tokens": 1, "detokenize": False, **options}
        return self._generate_all(
            [prefix for prefix, _ in steps],
            [self._parameters(logprob_token_ids=tokens, **options) for _, tokens in steps],
        )

    def _generate_all(self, prompts: Sequence[Sequence[int]], parameters: list[Any]) -> list[Any]:
        inputs = [{"prompt_token_ids": [*prompt]} for prompt in prompts]
        return self.llm.generate(inputs, parameters, use_tqdm=False) if inputs else []

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        prompts: list[list[int]] = []
        parameters: list[Any] = []
        stops: list[list[str]] = []
        earlier: Counter[str] = Counter()
        for context, given in (request.args for request in requests):
            asked = Generation.of(given)
            stops.append(asked.until)
            prompts.append(self.prompt(context, asked.room))
            parameters.append(self._sampling(asked, earlier[context]))
            earlier[context] += 1
        answers = self._generate_all(prompts, parameters)
        self._check_outputs(prompts[:1])
        texts = [self.tokenizer.decode(answer.outputs[0].token_ids, skip_special_tokens=True) for answer in answers]
        return [postprocess_generated_text(text, stop, None) for text, stop in zip(texts, stops, strict=True)]

    def _check_outputs(self, prompts: Sequence[list[int]]) -> None:
        """Raise CandidateError where the outputs after a prompt are NaN: vLLM generates from those as well, and says so
        in log-probabilities only, which take time at every token.
        """
        steps = [(prompt, [self.eot_token_id]) for prompt in prompts]
        check_numbers(_of_token(answer, self.eot_token_id)[0] for answer in self._next_tokens(steps))

    def _sampling(self, asked: Generation, repeated: int) -> Any:
        """vLLM's parameters for a text that was asked for `repeated` times before: another sample each time.

        Raises TaskError for an option that vLLM has not.
        """
        options = asked.options if asked.sampled else {**asked.options, "temperature": 0.0}
        fixed = {"max_tokens": asked.room, "stop": asked.until, "seed": self.seed + repeated}
        try:
            # Special tokens stay in the text that vLLM searches for stop strings, as a stop string may be one.
            return self._parameters(**options, **fixed, skip_special_tokens=False)
        except TypeError as error:
            raise TaskError(
                f"generation_kwargs of a task: vLLM cannot use {', '.join(asked.options)} ({error}); leave out what it"
                " has not, or use engine: {backend: hf}"
            ) from error


def _steps(request: Encoded) -> Iterator[tuple[tuple[int, ...], int]]:
    """(prefix, next token) for each token of the continuation."""
    for at, token in enumerate(request.continuation):
        yield (*request.context, *request.continuation[:at]), token


def _of_token(answer: Any, token: int) -> tuple[float, bool]:
    """The log-probability of a token as the next one, and whether it is the likeliest."""
    output = answer.outputs[0]
    return output.logprobs[0][token].logprob, output.token_ids[0] == token
