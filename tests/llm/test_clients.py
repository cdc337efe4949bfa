"""Who answers prompts: servers good and bad, a model on this machine, and a recording."""

import json
import re
import shutil
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest

from llmevo.errors import ConfigError, ProposerError, ProposerRefused, UserError, without_passwords
from llmevo.llm.client import Client, Connection, read_key
from llmevo.llm.local import LocalClient
from llmevo.llm.openai import OpenAIClient
from llmevo.llm.recorded import RecordedClient
from llmevo.run.log import events
from llmevo.search.prompts.question import Prompt, Reading
from llmevo.search.simulated_llm import SimulatedClient
from llmevo.testing import ClientContract
from support.fake_server import Answer, FakeServer, chat, refusal, serving
from support.tiny_model import POSITIONS, save_tiny

pytestmark = pytest.mark.usefixtures("slept")

KEY = "sk-very-secret-0123456789"


def prompt(schema: bool = True, **keys: Any) -> Prompt:
    message = {"role": "user", "content": "score 00 | 10 20\nscore 99 |"}
    return Prompt((message,), read=lambda _: Reading(), schema={"type": "object"} if schema else None, **keys)


def proposer(server: FakeServer | str, **keys: Any) -> OpenAIClient:
    url = server if isinstance(server, str) else server.url
    options: dict[str, Any] = {"model": "m", "api_key": KEY, "base_url": url, "retries": 1, "timeout": 20.0, **keys}
    return OpenAIClient(Connection(**options))


class TestOpenAIClient(ClientContract):
    @pytest.fixture
    def client(self) -> Iterator[Client]:
        with serving(chat("the answer")) as server:
            yield proposer(server)

    @pytest.fixture(params=[200, 401, 500])
    def lost_client(self, request: pytest.FixtureRequest) -> Iterator[Client]:
        with serving(Answer("<html>") if request.param == 200 else refusal(request.param, "no")) as server:
            yield proposer(server)


class TestLocalClient(ClientContract):
    @pytest.fixture
    def client(self, folder: Path) -> Client:
        return LocalClient(Connection(model=str(folder)))


class TestRecordedClient(ClientContract):
    @pytest.fixture
    def client(self, tmp_path: Path) -> Client:
        return recording(tmp_path, prompted(1, "one"))

    @pytest.fixture
    def lost_client(self, tmp_path: Path) -> Client:
        return recording(tmp_path, prompted(7, "seven"))


class TestSimulatedClient(ClientContract):
    @pytest.fixture
    def client(self) -> Client:
        return SimulatedClient(Connection("recombiner"))


# A server


def test_a_good_answer_comes_back_with_its_model_tokens_and_cost() -> None:
    with serving(chat("the answer", prompt=2000, completion=100)) as server:
        reply = proposer(server, price=(2.5, 10.0)).answer(prompt())
    assert (reply.text, reply.model, reply.problems) == ("the answer", "served-model", ())
    assert (reply.prompt_tokens, reply.completion_tokens) == (2000, 100)
    assert reply.cost == pytest.approx(0.006)


def test_the_request_carries_the_messages_the_schema_the_seed_and_the_key() -> None:
    with serving(chat("x")) as server:
        proposer(server, max_tokens=99, temperature=0.5).answer(prompt(seed=41))
    (request,) = server.requests
    assert request["path"] == "/v1/chat/completions"
    assert request["authorization"] == f"Bearer {KEY}"
    assert request["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert request["messages"][0]["content"].startswith("score")
    assert (request["model"], request["seed"]) == ("m", 41)
    assert (request["max_tokens"], request["temperature"]) == (99, 0.5)


def test_without_a_temperature_and_a_schema_the_request_names_none() -> None:
    with serving(chat("x")) as server:
        proposer(server).answer(prompt(schema=False))
    assert not {"temperature", "response_format"} & server.requests[0].keys()


def test_a_server_of_ones_own_needs_no_key_but_openais_does() -> None:
    with serving(chat("x")) as server:
        assert proposer(server, api_key=None).answer(prompt()).text == "x"
    with pytest.raises(ProposerRefused, match="OPENAI_API_KEY"):
        OpenAIClient(Connection())


OTHER = "http://127.0.0.1:9/v1"


@pytest.mark.parametrize(
    ("base_url", "environment", "sent"),
    [
        (None, {}, True),
        ("https://api.openai.com/v1/", {}, True),
        (OTHER, {}, False),
        ("https://api.openai.com.example.org/v1", {}, False),
        ("http://api.openai.com/v1", {}, False),
        (OTHER, {"OPENAI_BASE_URL": "http://127.0.0.1:9/openai"}, True),
        ("https://api.openai.com/v1", {"OPENAI_BASE_URL": OTHER}, False),
        ("http://[", {}, False),
    ],
)
def test_the_environments_key_goes_to_its_own_server_only(
    monkeypatch: pytest.MonkeyPatch, base_url: str | None, environment: dict[str, str], sent: bool
) -> None:
    for name, value in {"OPENAI_API_KEY": KEY, **environment}.items():
        monkeypatch.setenv(name, value)
    assert read_key(None, Path(), "llm", None, base_url) == (KEY if sent else None)


def test_another_servers_key_comes_from_the_variable_that_the_config_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THEIR_KEY", KEY)
    assert read_key(None, Path(), "llm", "THEIR_KEY", OTHER) == KEY
    with pytest.raises(UserError, match=r"llm\.api_key_env: the environment variable AWAY is not set"):
        read_key(None, Path(), "llm", "AWAY", OTHER)


def test_nothing_of_the_environment_goes_to_another_server_and_its_refusal_says_how_to_give_it_a_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_ORG_ID", "our-organization")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "x-gateway-key: of-the-gateway")
    seen: list[str] = []
    with serving(refusal(401, "no key")) as server:
        server.heard = lambda headers: seen.append(str(headers))
        asking = proposer(server, api_key=read_key(None, Path(), "llm", None, server.url))
        with pytest.raises(ProposerRefused, match=r"OPENAI_API_KEY was not sent, .*--api-key, llm\.api_key_env or"):
            asking.answer(prompt())
    assert server.requests[0]["authorization"] == "Bearer none"
    assert not any(secret in seen[0] for secret in (KEY, "our-organization", "of-the-gateway"))


def test_an_address_without_a_scheme_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ProposerRefused, match=r"'localhost:8000/v1' .* no scheme; write --base-url http://localhost"):
        proposer("localhost:8000/v1")


def test_an_address_with_a_query_is_refused_without_showing_it() -> None:
    with pytest.raises(ProposerRefused, match=r"the address https://x\.example/v1 of the server has a query") as raised:
        proposer("https://x.example/v1?key=sk-0123456789")
    assert "sk-0" not in str(raised.value)


@pytest.mark.parametrize("status", [200, 400, 401, 429])
def test_a_key_that_the_server_repeats_is_removed_wherever_it_comes_back(status: int) -> None:
    with serving(refusal(status, f"you sent Bearer {KEY}") if status > 200 else chat(f"your key {KEY}")) as server:
        if status == 200:
            server.script[:] = [Answer({**chat(f"your key is {KEY}").body, "model": f"m-{KEY}"})]
            reply = proposer(server).answer(prompt())
            said = f"{reply}"
            assert (reply.text, reply.model) == ("your key is ***", "m-***")
        else:
            with pytest.raises((ProposerError, ProposerRefused)) as failure:
                proposer(server).answer(prompt())
            said = str(failure.value)
    assert "***" in said
    assert KEY not in said


ESCAPABLE = "sk-a/b+c=very_secret-0123"


@pytest.mark.parametrize(
    "echoed",
    [
        ESCAPABLE.replace("/", "\\/"),
        "".join(f"\\u{ord(each):04x}" for each in ESCAPABLE),
        ESCAPABLE.replace("-", "\\u002D").replace("=", "\\u003d"),
        json.dumps({"key": ESCAPABLE.replace("/", "\\u002f")}),
        json.dumps(json.dumps({"key": ESCAPABLE.replace("/", "\\/")})),
        quote(ESCAPABLE, safe=""),
        quote(quote(ESCAPABLE, safe=""), safe=""),
        "".join(f"%{ord(each):02x}" for each in ESCAPABLE),
    ],
)
@pytest.mark.parametrize("status", [200, 401])
def test_a_key_that_the_server_repeats_escaped_is_removed_too(echoed: str, status: int) -> None:
    answer = chat(f'{{"note": "{echoed}!"}}') if status == 200 else refusal(status, f"your key: {echoed}!")
    with serving(answer) as server:
        client = proposer(server, api_key=ESCAPABLE)
        if status == 200:
            said = str(client.answer(prompt()))
        else:
            with pytest.raises(ProposerRefused) as failure:
                client.answer(prompt())
            said = str(failure.value)
    assert "***" in said
    shown = re.sub(r"\\+u00(..)", lambda found: chr(int(found[1], 16)), unquote(unquote(said))).replace("\\", "")
    assert ESCAPABLE not in shown


def test_a_key_that_is_a_word_leaves_replies_as_they_are() -> None:
    with serving(chat("one token more")) as server:
        assert proposer(server, api_key="token").answer(prompt()).text == "one token more"


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_for_good_is_a_users_error_after_exactly_one_request(status: int) -> None:
    with serving(refusal(status, "go away")) as server:
        with pytest.raises(ProposerRefused, match=r"go away.*--model m"):
            proposer(server, retries=4).answer(prompt())
        assert len(server.requests) == 1


def test_a_busy_server_is_asked_again_when_it_says_and_the_reply_tells(slept: list[float]) -> None:
    with serving(refusal(429, "slow down", retry_after="0"), chat("x")) as server:
        reply = proposer(server).answer(prompt())
    assert reply.text == "x"
    assert len(reply.problems) == 1
    assert re.search("retried after .*slow down", reply.problems[0])
    assert slept == [0]


@pytest.mark.parametrize(("header", "longest"), [("7", 7), ("86400", 60), ("-3", 0), ("nan", 0), ("soon", 20)])
def test_the_wait_follows_the_server_within_reason(header: str, longest: float, slept: list[float]) -> None:
    with serving(refusal(429, retry_after=header), chat("x")) as server:
        proposer(server).answer(prompt())
    (wait,) = slept
    assert 0 <= wait <= longest
    assert header not in ("7", "86400") or wait == longest


@pytest.mark.parametrize("status", [409, 500, 503])
def test_a_failure_that_passes_is_retried(status: int) -> None:
    with serving(refusal(status), chat("x")) as server:
        reply = proposer(server).answer(prompt())
    assert (reply.text, len(reply.problems), len(server.requests)) == ("x", 1, 2)


@pytest.mark.parametrize("retries", [0, 2])
def test_a_failure_that_stays_is_given_up_after_the_retries(retries: int) -> None:
    with serving(refusal(500, "broken")) as server:
        with pytest.raises(ProposerError, match="broken"):
            proposer(server, retries=retries).answer(prompt())
        assert len(server.requests) == retries + 1


def test_an_unreachable_server_is_given_up_after_the_retries(slept: list[float]) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        with pytest.raises(ProposerError, match=r"127\.0\.0\.1"):
            proposer(f"http://127.0.0.1:{closed.getsockname()[1]}/v1").answer(prompt())
    assert len(slept) == 1


@pytest.mark.parametrize("status", [400, 422, 500])
def test_a_server_with_another_way_to_name_a_schema_is_asked_that_way_then_and_ever_after(status: int) -> None:
    refused = "response_format.type: Input should be 'text' or 'json_object'"  # llama-cpp-python, with status 500
    with serving(refusal(status, refused), chat("x")) as server:
        asking = proposer(server)
        assert asking.answer(prompt()).text == "x"
        asking.answer(prompt())
    assert [request["response_format"]["type"] for request in server.requests] == [
        "json_schema",
        "json_object",
        "json_object",
    ]
    assert server.requests[-1]["response_format"]["schema"] == {"type": "object"}


@pytest.mark.parametrize("status", [400, 422])
def test_a_server_without_schemas_is_asked_without_one_then_and_ever_after(status: int) -> None:
    with serving(refusal(status, "response_format?"), refusal(status, "response_format?"), chat("x")) as server:
        asking = proposer(server)
        first, second = asking.answer(prompt()), asking.answer(prompt())
    sent = ["response_format" in request for request in server.requests]
    assert sent == [True, True, False, False]
    assert [said in first.problems[n] for n, said in enumerate(("another form of it", "without it"))] == [True, True]
    assert second.problems == ()


def test_a_refusal_that_names_no_option_costs_one_repetition_and_changes_nothing_after_it() -> None:
    with serving(refusal(400, "too long")) as server:
        asking = proposer(server, temperature=0.1)
        for _ in range(2):
            with pytest.raises(ProposerError, match="too long"):
                asking.answer(prompt())
    assert ["response_format" in request for request in server.requests] == [True, False, True, False]
    assert all(request["temperature"] == 0.1 for request in server.requests)


@pytest.mark.parametrize("option", ["temperature", "max_tokens"])
def test_an_option_that_a_refusal_names_is_never_sent_again(option: str) -> None:
    with serving(refusal(400, f"Unsupported parameter: {option}"), chat("x")) as server:
        asking = proposer(server, temperature=0.1)
        asking.answer(prompt())
        asking.answer(prompt())
    assert [option in request for request in server.requests] == [True, False, False]
    assert all("response_format" in request for request in server.requests)


@pytest.mark.parametrize(
    "body",
    [
        {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]},
        {"detail": "unknown field: seed"},
        {"error": "unknown field: seed"},
        {"error": {"message": "unknown option", "param": "seed"}},
        "unknown field: seed",
    ],
    ids=["FastAPI", "a detail", "an error", "a param", "a text"],
)
def test_a_refusal_of_any_form_is_understood_and_shown(body: Any) -> None:
    with serving(Answer(body, 422), chat("x")) as server:
        reply = proposer(server).answer(prompt())
    assert ["seed" in request for request in server.requests] == [True, False]
    assert "the server refused a request with seed" in reply.problems[0]
    assert "permitted" in reply.problems[0] or "unknown" in reply.problems[0]


def test_details_that_repeat_the_request_cost_no_option_that_they_do_not_name() -> None:
    echoed = {"temperature": 0.1, "response_format": {"type": "json_schema"}, "max_tokens": 5}
    detail = {"type": "x", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted", "input": echoed}
    with serving(Answer({"detail": [detail]}, 422), chat("x")) as server:
        proposer(server, temperature=0.1).answer(prompt())
    assert [key for key in ("temperature", "response_format", "max_tokens") if key in server.requests[1]] == [*echoed]


def test_a_request_that_is_too_long_for_its_answer_does_not_take_the_limit_from_later_ones() -> None:
    too_large = "'max_tokens' is too large: 4096. This model's maximum context length is 8192 tokens"
    with serving(refusal(400, too_large), chat("x")) as server:
        asking = proposer(server)
        asking.answer(prompt())
        asking.answer(prompt())
    assert ["max_tokens" in request for request in server.requests] == [True, False, True]


def test_thoughts_that_are_counted_in_the_total_only_are_paid() -> None:
    body: Any = chat("x", prompt=7, completion=3).body
    body["usage"]["total_tokens"] = 1010
    with serving(Answer(body)) as server:
        reply = proposer(server, price=(1.0, 1.0)).answer(prompt())
    assert (reply.prompt_tokens, reply.completion_tokens) == (7, 1003)
    assert reply.cost == pytest.approx(1010e-6)


@pytest.mark.parametrize("answer", [chat(None), chat(""), Answer({**chat("x").body, "choices": []})])
def test_an_answer_without_content_is_an_empty_reply(answer: Answer) -> None:
    with serving(answer) as server:
        reply = proposer(server).answer(prompt())
    assert (reply.text, reply.prompt_tokens) == ("", 7)


def test_an_answer_without_a_token_count_is_estimated_so_that_a_cap_on_its_cost_holds() -> None:
    with serving(Answer({**chat("x" * 40).body, "usage": None})) as server:
        reply = proposer(server, price=(1.0, 10.0)).answer(prompt())
    assert (reply.prompt_tokens, reply.completion_tokens) == (6, 10)
    assert reply.cost == pytest.approx(106e-6)
    assert "estimated" in reply.problems[0]


@pytest.mark.parametrize("usage", ["many", [1], {}, {"prompt_tokens": {}}])
def test_an_answer_in_parts_is_their_text_whatever_its_usage_looks_like(usage: Any) -> None:
    body: Any = chat("x", prompt=2000).body
    thoughts = {"type": "thinking", "thinking": [{"type": "text", "text": "so"}]}
    parts = [thoughts, {"type": "text", "text": "the "}, {"type": "text"}, 5, {"text": "answer"}]
    body["choices"][0]["message"]["content"] = parts
    with serving(Answer(body)) as server:
        reply = proposer(server, price=(2.5, 10.0)).answer(prompt())
    assert (reply.text, reply.prompt_tokens, reply.problems) == ("the answer", 2000, ())
    with serving(Answer({**body, "usage": usage})) as server:
        reply = proposer(server).answer(prompt())
    assert reply.text == "the answer"
    assert "estimated" in reply.problems[0]


@pytest.mark.parametrize("url", ["http://host:abc/v1", "http://[::1", "http://me:se/cret@host:x/v1"])
def test_an_address_that_is_none_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ProposerRefused, match=r"no valid one .*; check --base-url") as error:
        proposer(url)
    assert "cret" not in str(error.value)


def test_users_and_passwords_of_addresses_are_left_out_of_a_text() -> None:
    text = 'https://me:p@ss@host/v1 and "http://key@host:80", "a@b"; ftp://host/a@b'
    assert without_passwords(text) == 'https://host/v1 and "http://host:80", "a@b"; ftp://host/a@b'


@pytest.mark.parametrize("count", [12.5, 1e300, None, -1])
def test_numbers_of_a_server_that_are_none_do_not_cost_the_answer(count: float | None) -> None:
    body = {**chat("x" * 40).body, "model": 5, "usage": {"prompt_tokens": count, "completion_tokens": 3}}
    with serving(Answer(body)) as server:
        reply = proposer(server).answer(prompt())
    assert (reply.text, reply.model) == ("x" * 40, "5")
    assert (reply.prompt_tokens, reply.completion_tokens) == (6, 10)
    assert "estimated" in reply.problems[0]


def test_an_answer_of_ten_megabytes_is_given_up_after_one_and_one_request() -> None:
    with serving(chat("x" * 10_000_000)) as server:
        with pytest.raises(ProposerError, match="longer than 1,000,000 bytes"):
            proposer(server, retries=4).answer(prompt())
        assert len(server.requests) == 1


@pytest.mark.parametrize("status", [200, 400, 500])
def test_an_endless_answer_is_none_whatever_its_status(status: int) -> None:
    with serving(Answer("x" * 2_000_000, status)) as server, pytest.raises(ProposerError, match="longer than"):
        proposer(server, retries=0).answer(prompt())


def test_a_silent_server_is_given_up_and_asked_once_only_from_then_on(slept: list[float]) -> None:
    with serving(Answer(silent=True)) as server:
        asking = proposer(server, timeout=0.1, retries=2)
        for requests in (3, 4, 5):
            with pytest.raises(ProposerError, match=r"[Tt]ime"):
                asking.answer(prompt())
            assert len(server.requests) == requests
    assert len(slept) == 2


def test_a_server_that_has_found_its_voice_again_is_retried_again() -> None:
    down = [refusal(500)] * 3
    with serving(*down, chat("x"), refusal(500), chat("y")) as server:
        asking = proposer(server, retries=1)
        for _ in range(2):
            with pytest.raises(ProposerError):
                asking.answer(prompt())
        assert [asking.answer(prompt()).text for _ in range(2)] == ["x", "y"]
        assert len(server.requests) == 6


def test_an_answer_that_drips_in_is_given_up_in_time() -> None:
    with serving(Answer({**chat("x" * 2000).body}, pause=0.02)) as server, pytest.raises(ProposerError, match="ime"):
        proposer(server, timeout=0.2, retries=0).answer(prompt())


def test_a_server_that_knows_the_other_name_of_the_token_limit_is_told_that() -> None:
    refused = "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."
    with serving(refusal(400, refused), chat("x")) as server:
        asking = proposer(server, max_tokens=99)
        asking.answer(prompt())
        asking.answer(prompt())
    assert [request.get("max_completion_tokens") for request in server.requests] == [None, 99, 99]
    assert "max_tokens" not in server.requests[-1]


@pytest.mark.parametrize("says", ["unknown: max_completion_tokens", "Extra inputs are not permitted: max_tokens"])
def test_openais_own_name_of_the_token_limit_is_given_up_for_the_older_one_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, says: str
) -> None:
    with serving(refusal(400, says), chat("x")) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        reply = OpenAIClient(Connection(api_key=KEY, max_tokens=99)).answer(prompt())
    assert [request.get("max_completion_tokens") for request in server.requests] == [99, None]
    assert server.requests[-1]["max_tokens"] == 99
    assert "asked with max_tokens instead" in reply.problems[0]


def test_a_server_that_knows_none_of_the_options_is_asked_without_any_at_a_bounded_cost() -> None:
    names = ("temperature", "seed", "max_tokens", "max_completion_tokens", "response_format", "response_format")
    refusals = [refusal(400, f"unknown field {name}") for name in names]
    with serving(*refusals, chat("x")) as server:
        asking = proposer(server, temperature=0.5)
        assert asking.answer(prompt()).text == "x"
        asking.answer(prompt())
    assert server.requests[-1].keys() == {"messages", "model", "authorization", "path"}
    assert len(server.requests) == len(names) + 2


def test_a_server_that_refuses_everything_is_given_up_once_nothing_is_left_to_leave_out() -> None:
    with serving(refusal(400, "max_tokens, seed, temperature, response_format: no")) as server:
        with pytest.raises(ProposerError):
            proposer(server, temperature=0.5, retries=4).answer(prompt())
        assert len(server.requests) <= 7


def test_an_answer_cut_at_the_token_limit_says_so() -> None:
    with serving(chat('{"propos', finish="length")) as server:
        reply = proposer(server, max_tokens=99).answer(prompt())
    assert "cut at 99 tokens" in reply.problems[0]


@pytest.mark.parametrize(
    "body",
    [
        "{",
        "<html>Please log in</html>",
        "",
        {"error": "upstream"},
        {"choices": [{}]},
        [1],
        {"choices": [{"message": 3}]},
    ],
)
def test_what_is_no_chat_completion_is_no_answer(body: Any) -> None:
    kind = {"content-type": "application/json"} if body == "{" else {}
    with serving(Answer(body, headers=kind)) as server, pytest.raises(ProposerError):
        proposer(server).answer(prompt())


def test_a_reply_can_always_be_written_to_the_log() -> None:
    with serving(chat("half \ud83d a smile")) as server:
        reply = proposer(server).answer(prompt())
    assert reply.text.encode() == b"half ? a smile"


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500])
@pytest.mark.parametrize("before", ["", "x" * 240], ids=["short", "long"])
def test_no_error_ever_shows_the_key_even_if_the_server_repeats_it(status: int, before: str) -> None:
    answer = refusal(status, f"{before}bad key {KEY} given", retry_after="0")
    with serving(answer) as server, pytest.raises((ProposerError, ProposerRefused)) as caught:
        proposer(server).answer(prompt())
    assert KEY[:8] not in str(caught.value)
    assert "bad key" in str(caught.value)


def test_no_reported_problem_shows_the_key() -> None:
    echo = f"key {KEY}"
    with serving(refusal(500, echo), refusal(400, echo), chat("x")) as server:
        reply = proposer(server).answer(prompt())
    assert len(reply.problems) == 2
    assert KEY not in repr(reply)


def test_a_connection_hides_its_key_when_printed() -> None:
    assert KEY not in repr(Connection(api_key=KEY))
    assert KEY not in repr(proposer("http://127.0.0.1:9/v1").__dict__["_connection"])


@pytest.mark.parametrize("key", ["sk-\u2026", "sk-a\n", "sk a"])
def test_a_key_that_no_header_can_carry_is_an_error_not_a_crash(key: str) -> None:
    with serving(refusal(401)) as server, pytest.raises((ProposerError, ProposerRefused)) as caught:
        proposer(server, api_key=key).answer(prompt())
    assert key not in str(caught.value)


@pytest.mark.parametrize("status", [401, 403])
def test_the_check_before_a_run_finds_a_refused_key(status: int) -> None:
    with (
        serving(refusal(status, f"bad key {KEY}")) as server,
        pytest.raises(ProposerRefused, match="bad key") as caught,
    ):
        proposer(server).check()
    assert KEY not in str(caught.value)


def test_the_check_before_a_run_finds_that_nobody_answers() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(ProposerRefused, match="no server answers"):
            proposer(f"http://127.0.0.1:{closed.getsockname()[1]}/v1").check()


@pytest.mark.parametrize(
    "answer", [Answer({"object": "list", "data": []}), Answer("<html>"), refusal(404), refusal(500)]
)
def test_the_check_before_a_run_lets_a_server_without_a_list_of_models_pass(answer: Answer) -> None:
    with serving(answer) as server:
        proposer(server).check()
    assert [request["path"] for request in server.requests] == ["/v1/models"]


# A model on this machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = save_tiny(tmp_path_factory.mktemp("local") / "tiny")
    yield made
    shutil.rmtree(made)


def question(text: str = "score 00 | 10 20 30\nscore 99 |", **keys: Any) -> Prompt:
    options: dict[str, Any] = {"integers": 3, "digits": 2, "samples": 4, **keys}
    return Prompt(({"role": "user", "content": text},), read=lambda _: Reading(), **options)


@pytest.mark.parametrize("temperature", [None, 0.0, 5.0])
@pytest.mark.parametrize(("integers", "samples"), [(1, 1), (3, 4), (9, 2)])
def test_a_local_model_always_answers_with_lines_of_two_digit_numbers(
    folder: Path, temperature: float | None, integers: int, samples: int
) -> None:
    local = LocalClient(Connection(model=str(folder), temperature=temperature))
    reply = local.answer(question(integers=integers, samples=samples))
    lines = reply.text.split("\n")
    assert len(lines) == samples
    assert all(re.fullmatch(rf"\d\d( \d\d){{{integers - 1}}}", line) for line in lines)
    assert reply.completion_tokens == samples * integers * 2
    assert reply.model == str(folder)


def test_a_local_models_answer_follows_from_the_seed(folder: Path) -> None:
    local = LocalClient(Connection(model=folder.name, folder=folder))
    first = local.answer(question(seed=5)).text
    assert local.answer(question(seed=5)).text == first
    assert LocalClient(Connection(model=str(folder))).answer(question(seed=5)).text == first
    assert local.answer(question(seed=6)).text != first


def test_at_temperature_zero_all_samples_are_the_likeliest_one(folder: Path) -> None:
    reply = LocalClient(Connection(model=str(folder), temperature=0.0)).answer(question())
    assert len({*reply.text.split("\n")}) == 1


def test_a_prompt_longer_than_the_model_holds_loses_its_oldest_lines(folder: Path) -> None:
    local = LocalClient(Connection(model=str(folder), temperature=0.0))
    text = "".join(f"score {i:02d} | 10 20 30\n" for i in range(40)) + "score 99 |"
    reply = local.answer(question(text))
    assert reply.text == local.answer(question(text[-reply.prompt_tokens :])).text
    assert reply.prompt_tokens + 1 + 3 * 3 - 1 <= POSITIONS


def test_a_genome_that_is_long_for_the_model_gets_its_room_before_the_prompt(folder: Path) -> None:
    local = LocalClient(Connection(model=str(folder)))
    reply = local.answer(question("9" * 200, integers=15))
    assert reply.prompt_tokens + 15 * 3 <= POSITIONS


def test_a_local_model_needs_a_reference_that_exists(tmp_path: Path) -> None:
    with pytest.raises(ProposerRefused, match=r"llm\.model"):
        LocalClient(Connection())
    for model in (tmp_path, tmp_path / "away"):
        local = LocalClient(Connection(model=str(model)))
        for use in (local.check, lambda local=local: local.answer(question())):
            with pytest.raises(UserError, match=model.name):
                use()


def test_a_vocabulary_without_single_digits_is_refused(folder: Path, tmp_path: Path) -> None:
    blind = shutil.copytree(folder, tmp_path / "blind")
    tokens = json.loads((blind / "tokenizer.json").read_text())
    swapped = str.maketrans("0123456789", "\u0430\u0431\u0432\u0433\u0434\u0435\u0436\u0437\u0438\u0439")
    vocabulary: dict[str, int] = tokens["model"]["vocab"]
    tokens["model"]["vocab"] = {name.translate(swapped): place for name, place in vocabulary.items()}
    (blind / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(ProposerRefused, match="single digits"):
        LocalClient(Connection(model=str(blind))).answer(question())
    with pytest.raises(ProposerRefused, match="single digits"):
        LocalClient(Connection(model=str(blind))).check()


# A recording


def prompted(generation: int, reply: str | None, problems: tuple[str, ...] = ()) -> events.Prompted:
    return events.Prompted(
        generation=generation,
        model="gpt-x",
        style="completion",
        messages=[],
        reply=reply,
        tokens={"prompt": 11, "completion": 5},
        cost=0.25,
        seconds=1.0,
        problems=[*problems],
        analysis="",
        used=1,
    )


def recording(folder: Path, *log: events.Event) -> RecordedClient:
    lines = [event.model_dump_json(by_alias=True) + "\n" for event in log]
    (folder / "events.jsonl").write_text("".join(lines), encoding="utf-8")
    return RecordedClient(Connection(root=folder.parent, transcript=Path(folder.name)))


def test_a_recording_answers_by_generation_with_what_the_reply_took(tmp_path: Path) -> None:
    told = events.Told(generation=1, state="", sigma=None, best=None)
    recorded = recording(tmp_path, prompted(1, "one"), told, prompted(2, "two"))
    assert (recorded.style, recorded.model) == ("completion", "gpt-x")
    assert [recorded.answer(prompt(generation=g)).text for g in (2, 1, 2)] == ["two", "one", "two"]
    reply = recorded.answer(prompt(generation=1))
    assert (reply.model, reply.prompt_tokens, reply.completion_tokens, reply.cost) == ("gpt-x", 11, 5, 0.25)


def test_a_recorded_reply_may_hold_any_kind_of_line_end(tmp_path: Path) -> None:
    text = "a\u2028b\u0085c\r\nd\x0be"
    assert recording(tmp_path, prompted(1, text)).answer(prompt(generation=1)).text == text


def test_a_recording_has_no_answer_where_the_run_had_none(tmp_path: Path) -> None:
    recorded = recording(tmp_path, prompted(1, None, ("the server was away",)))
    with pytest.raises(ProposerError, match="the server was away"):
        recorded.answer(prompt(generation=1))
    with pytest.raises(ProposerError, match="generation 7"):
        recorded.answer(prompt(generation=7))


def test_a_recording_gives_the_answer_and_its_repair_each_in_its_place(tmp_path: Path) -> None:
    mended = prompted(1, "mended").model_copy(update={"repair": True})
    recorded = recording(tmp_path, prompted(1, "prose"), mended, prompted(2, "two"))
    asked_again = prompt(generation=1)
    said = ({"role": "assistant", "content": "prose"}, {"role": "user", "content": "again"})
    repair = replace(asked_again, messages=(*asked_again.messages, *said))
    assert [recorded.answer(p).text for p in (asked_again, repair)] == ["prose", "mended"]


def test_a_recording_finds_the_answer_to_the_same_messages_wherever_a_run_goes_on(tmp_path: Path) -> None:
    question, again = prompt(generation=1), prompt(generation=1)
    again = replace(again, messages=(*again.messages, {"role": "assistant", "content": "prose"}))
    log = [
        prompted(1, text).model_copy(update={"messages": [*asked.messages]})
        for text, asked in (("prose", question), ("mended", again))
    ]
    assert recording(tmp_path, *log).answer(again).text == "mended"


def test_a_transcript_may_be_the_file_itself(tmp_path: Path) -> None:
    recording(tmp_path, prompted(1, "one"))
    recorded = RecordedClient(Connection(transcript=tmp_path / "events.jsonl"))
    assert recorded.answer(prompt(generation=1)).text == "one"


@pytest.mark.parametrize(
    "text",
    [
        '{"event": "prompted", "generation": 1, "model": "m", "reply": null}\n',
        '{"event": "prompted", "generation": 1, "model": "m", "style": "chat", "reply": "x"}\n',
        "not JSON\n",
        "[]\n",
        "3\n",
        "{}\n",
        '{"event": "prompted"}\n',
        "",
        '{"event": "told"}\n',
        "\xff\xfe",
    ],
)
def test_a_transcript_that_is_no_log_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "events.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"llm\.transcript.*events\.jsonl"):
        RecordedClient(Connection(transcript=tmp_path))


def test_a_missing_transcript_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"llm\.transcript.*away"):
        RecordedClient(Connection(root=tmp_path, transcript=Path("away")))
    with pytest.raises(ConfigError, match=r"llm\.transcript"):
        RecordedClient(Connection())
