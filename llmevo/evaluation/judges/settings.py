"""What a config says of a judge: `judge:` and `votes:` of a line of `tasks:`."""

from pydantic import BaseModel, ConfigDict, Field, field_validator

from llmevo.llm.client import Price


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class Replies(Strict):
    """What a candidate may write."""

    reply_tokens: int = Field(default=256, ge=1)
    """Of a reply to a prompt, at most."""


class Judge(Replies):
    """An LLM that judges replies, behind any OpenAI-compatible server."""

    model: str
    """The server's name for it."""
    base_url: str | None = None
    """Of a server of your own; OpenAI's by default."""
    api_key_file: str | None = None
    """A file that holds the key. `--api-key` is the proposing LLM's."""
    api_key_env: str | None = None
    """The environment variable that holds the key. Without this and `api_key_file`, OPENAI_API_KEY goes to OpenAI's
    server, or to that of OPENAI_BASE_URL, and to no other."""
    rubric: str | None = None
    """A text file that says what a good reply is; llmevo's `prompts/judge_rubric.j2` by default."""
    scale: tuple[float, float] = (1.0, 10.0)
    """The worst and the best grade. Replies that have a reference are compared with it instead of graded."""
    repairs: int = Field(default=2, ge=0)
    """How often an answer that cannot be read, or lies outside the scale, is asked for again."""
    parallel: int = Field(default=8, ge=1)
    """Requests at a time."""
    max_tokens: int = Field(default=2048, ge=16)
    """Of an answer, thoughts included."""
    timeout: float = Field(default=120.0, gt=0)
    """Seconds a request may take."""
    retries: int = Field(default=4, ge=0)
    """Further tries after a failure that may pass by itself."""
    price: Price = Price()

    @field_validator("scale")
    @classmethod
    def _rising(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if scale[0] >= scale[1]:
            raise ValueError("a scale goes from the worst grade to the best, such as [1, 10]")
        return scale


class Votes(Replies):
    """A person who votes on pairs of replies, in the terminal."""

    pairs: int = Field(default=3, ge=1)
    """Votes on each candidate that replies as none before it has."""
