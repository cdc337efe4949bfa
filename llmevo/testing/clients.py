"""The contract of an LLM client."""

import pytest

from llmevo.errors import ProposerError, ProposerRefused
from llmevo.llm.client import Client
from llmevo.llm.templates import Templates
from llmevo.search.prompts import STYLES
from llmevo.search.prompts.question import Prompt, Question, Reading
from llmevo.testing.optimizers import space, start_rows


def prompt_for(style: str) -> Prompt:
    """The prompt of a search's first generation, in one of the styles."""
    over = space()
    trials = start_rows(over)
    question = Question(over, trials, {"sums": (1.0, "acc,none")}, 2, 1, 0.1, len(trials), 60)
    return STYLES[style].ask(question, Templates(), 0)


class ClientContract:
    """What an LLM client promises to the search. Subclass it with the fixtures `client` and `lost_client`."""

    @pytest.fixture
    def client(self) -> Client:
        raise NotImplementedError("give the subclass a fixture `client` that returns a client with an LLM behind it")

    @pytest.fixture
    def lost_client(self) -> Client:
        """A client whose LLM does not answer; by default there is no such client."""
        pytest.skip("the client cannot lose its LLM")

    def test_it_names_its_model_and_a_style_of_prompts(self, client: Client) -> None:
        assert client.style in STYLES
        assert isinstance(client.model, str)
        assert client.model

    def test_its_check_passes_where_there_is_an_llm(self, client: Client) -> None:
        client.check()

    def test_its_reply_is_text_with_what_it_took(self, client: Client) -> None:
        prompt = prompt_for(client.style)
        reply = client.answer(prompt)
        assert isinstance(reply.text, str)
        reply.text.encode()  # the log is UTF-8
        assert reply.model
        assert reply.prompt_tokens >= 0
        assert reply.completion_tokens >= 0
        assert reply.cost >= 0
        assert isinstance(prompt.read(reply.text), Reading)

    def test_an_llm_that_does_not_answer_is_an_error_of_a_proposer(self, lost_client: Client) -> None:
        """The search continues without it; any other exception would end the run."""
        with pytest.raises((ProposerError, ProposerRefused)):
            lost_client.answer(prompt_for(lost_client.style))
