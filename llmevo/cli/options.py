"""The options that several commands share, and the config they amount to."""

from pathlib import Path
from typing import Annotated, Any

import typer

from llmevo.config import Config, parse_budget, read_config, read_loggers
from llmevo.errors import ConfigError
from llmevo.run.trackers import LOGGERS, check_installed
from llmevo.search.optimizers import OPTIMIZERS

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; mergekit-evolve's run as they are.")]


RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]


ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", help="Key of the LLM's server; OPENAI_API_KEY is OpenAI's alone.", show_default=False),
]


BaseUrl = Annotated[str | None, typer.Option(help="Your own OpenAI-compatible server.", show_default=False)]


Model = Annotated[str | None, typer.Option(help="The LLM that proposes.", show_default=False)]


OptimizerName = Annotated[str | None, typer.Option(help=f"One of {', '.join(OPTIMIZERS)}.", show_default=False)]


Budget = Annotated[
    list[str] | None,
    typer.Option(
        help="Candidates to score, or amounts with units: '100, 50000 items, 60 min, $5'; may be repeated.",
        show_default=False,
    ),
]


Seed = Annotated[int | None, typer.Option(help="Decides everything random.", show_default=False)]


Backend = Annotated[str | None, typer.Option(help="auto, hf or vllm.", show_default=False)]


TaskFolders = Annotated[
    list[Path] | None,
    typer.Option("--task-search-path", help="Folder with lm-eval tasks; may be repeated.", show_default=False),
]


MaskNames = Annotated[bool, typer.Option("--mask-names", help="Hide all names from the LLM.")]


MaxCalls = Annotated[
    int | None, typer.Option("--max-llm-calls", help="Then go on without the LLM.", show_default=False)
]


MaxCost = Annotated[
    float | None, typer.Option(help="The same for its cost, by llm.price in the config.", show_default=False)
]


Loggers = Annotated[
    list[str] | None,
    typer.Option("--logger", help=f"Tell {', '.join(LOGGERS)} as well; may be repeated.", show_default=False),
]


Trust = Annotated[
    bool, typer.Option("--trust", help="Let a log from elsewhere run, open and contact what it names; remembered.")
]


Strict = Annotated[bool, typer.Option("--strict-llm", help="Stop, resumably, when the LLM gives no answer.")]


def read_settings(config: Path, folders: list[Path] | None = None, **options: Any) -> Config:
    """The config with the options of the command line, named `section__key`; those not given change nothing."""
    given = {name.replace("__", "."): value for name, value in options.items() if value not in (None, False)}
    if budget := given.get("search.budget"):
        given["search.budget"] = parse_budget(*budget)
    settings = read_config(config, given)
    if not folders:
        return settings
    paths = [*settings.task_search_path, *(path.absolute() for path in folders)]
    return settings.model_copy(update={"task_search_path": paths})


def with_loggers(config: Config, names: list[str] | None) -> Config:
    """The config with these loggers beside its own. Raises ConfigError for one that is unknown or not installed."""
    there = {logger["name"] for logger in config.loggers}
    try:
        loggers = read_loggers([*config.loggers, *(name for name in dict.fromkeys(names or []) if name not in there)])
    except ValueError as error:
        raise ConfigError(f"--logger: {error}") from None
    check_installed(loggers)
    return config.model_copy(update={"loggers": loggers}) if loggers else config


Force = Annotated[bool, typer.Option("--force", help="Go on though config, questions or models have changed.")]
