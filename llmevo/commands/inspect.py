"""`llmevo inspect`."""

from llmevo import inspection, terminal
from llmevo.bench import Bench
from llmevo.config import read_config
from llmevo.options import ApiKey, ConfigFile


def inspect(config: ConfigFile, api_key: ApiKey = None) -> None:
    """Check a config and its models, and show what a run would do; the same as `run --dry-run`."""
    inspection.inspect(Bench(read_config(config), config.parent.absolute(), api_key), terminal.console)
