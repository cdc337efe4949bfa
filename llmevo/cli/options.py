"""Options that several commands share, and the config with them."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from llmevo.config import Config, parse_budget, parse_changes, parse_workers, read_config, read_loggers
from llmevo.errors import ConfigError, UserError
from llmevo.run.trackers import LOGGERS, check_installed
from llmevo.search.paths.registry import every

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A YAML file. Configs of mergekit-evolve run unchanged.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a key of the config, such as search.racing.looks=3 or genome.models.0=my-model; may be repeated.",
    ),
]


def _no_blank(key: str | None) -> str | None:
    """Refuse what `--api-key "$VARIABLE"` gives without that variable: the search would go on without its LLM."""
    if key is not None and not key.strip():
        raise UserError("--api-key: the key is empty; set the variable that it is taken from, or leave the option out")
    return key


ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        callback=_no_blank,
        help="API key of the LLM's server. OPENAI_API_KEY is used for OpenAI only.",
    ),
]
BaseUrl = Annotated[str | None, typer.Option(help="URL of an OpenAI-compatible server.")]
Model = Annotated[str | None, typer.Option(help="The LLM that proposes candidates.")]
OptimizerName = Annotated[str | None, typer.Option(help=f"One of {', '.join(every())}.")]
Budget = Annotated[
    list[str] | None,
    typer.Option(help="Candidates to score, or amounts with units: '100, 50000 items, 60 min, $5'; may be repeated."),
]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random.")]
Backend = Annotated[str | None, typer.Option(help="auto, hf or vllm.")]
Workers = Annotated[
    str | None,
    typer.Option(help="Score so many candidates at the same time, each in a process of its own; auto: one a GPU."),
]
TaskFolders = Annotated[
    list[Path] | None, typer.Option("--task-search-path", help="Folder with lm-eval tasks; may be repeated.")
]
MaskNames = Annotated[bool, typer.Option("--mask-names", help="Hide names of models and tasks from the LLM.")]
MaxCalls = Annotated[int | None, typer.Option("--max-llm-calls", help="Continue without the LLM after so many calls.")]
MaxCost = Annotated[
    float | None, typer.Option(help="Continue without the LLM after this cost, by llm.price of the config.")
]
Loggers = Annotated[
    list[str] | None, typer.Option("--logger", help=f"Also log to {', '.join(LOGGERS)}; may be repeated.")
]
Trust = Annotated[
    bool, typer.Option("--trust", help="Allow a log from elsewhere to run, open and contact what it names; remembered.")
]
Strict = Annotated[bool, typer.Option("--strict-llm", help="Stop when the LLM gives no answer; resume continues.")]
Force = Annotated[bool, typer.Option("--force", help="Continue although config, questions or models have changed.")]

As = Annotated[
    str | None,
    typer.Option("--as", metavar="FORMAT", help="lora, fp8, gguf:q8_0, gguf:q4_0, gguf:f16, gguf:bf16; experts."),
]
Ranks = Annotated[
    str | None,
    typer.Option("--rank", help="Rank of the adapter: a number, auto (by --energy or --parameters) or exact."),
]
Energy = Annotated[
    float | None, typer.Option(help="Share of the squared singular values that auto keeps; 0.95 by default.")
]
Parameters = Annotated[
    str | None, typer.Option(help="Number of parameters of the adapter, such as 10M; the best ranks for it are chosen.")
]
DonorFile = Annotated[
    Path | None,
    typer.Option("--donor", metavar="FILE.gguf", help="A GGUF file of the base; gives metadata and tokenizer."),
]


def read_settings(
    config: Path, folders: list[Path] | None = None, changes: list[str] | None = None, **options: Any
) -> Config:
    """Read a config, changed by `--set`, then by options of the command line, named `section__key`; None and False
    change nothing.
    """
    return read_changed(config, folders, changes, **options)[0]


def read_changed(
    config: Path, folders: list[Path] | None = None, changes: list[str] | None = None, **options: Any
) -> tuple[Config, dict[str, Any]]:
    """Return what `read_settings` does, and all that was changed, {key: plain value}."""
    # 0 is a value, and equal to False.
    given = {
        name.replace("__", "."): value for name, value in options.items() if value is not None and value is not False
    }
    if budget := given.get("search.budget"):
        given["search.budget"] = parse_budget(*budget).model_dump(mode="json")
    if workers := given.get("engine.workers"):
        given["engine.workers"] = parse_workers(workers)
    changed = {**parse_changes(changes or []), **given}
    settings = read_config(config, changed)
    if not folders:
        return settings, changed
    paths = [*settings.task_search_path, *(path.absolute() for path in folders)]
    return settings.model_copy(update={"task_search_path": paths}), {**changed, "task_search_path": [*map(str, paths)]}


def with_loggers(config: Config, names: list[str] | None) -> Config:
    """Return the config with further loggers. Raises ConfigError for one that is unknown or not installed."""
    there = {logger["name"] for logger in config.loggers}
    try:
        loggers = read_loggers([*config.loggers, *(name for name in dict.fromkeys(names or []) if name not in there)])
    except ValueError as error:
        raise ConfigError(f"--logger: {error}") from None
    check_installed(loggers)
    return config.model_copy(update={"loggers": loggers}) if loggers else config


def on_command_line(context: typer.Context) -> dict[str, Any]:
    """Return the options that the command line gives, {option: value}."""
    options = {of.name: of.opts[0] for of in context.command.params if of.name and of.opts[0].startswith("--")}
    sources = {name: context.get_parameter_source(name) for name in options}
    return {
        options[name]: context.params[name]
        for name, source in sources.items()
        if source and source.name == "COMMANDLINE"
    }


def refuse_unused(given: Mapping[str, Any], used: Collection[str], way: str) -> None:
    """Raise UserError for an option that is not used; `way` says what to do instead. A key is not shown."""
    for option, value in given.items():
        if option in used:
            continue
        values: list[Any] = [] if value is True else value if isinstance(value, list) else [value]
        shown = ["KEY"] if option == "--api-key" else map(str, values)
        raise UserError(f"{' '.join([option, *shown])}: {way}")
