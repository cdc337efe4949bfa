"""Silence for libraries that print."""

import logging
from collections.abc import Generator
from contextlib import contextmanager, redirect_stderr
from io import StringIO

import datasets


@contextmanager
def quiet() -> Generator[None]:
    """Keep lm-eval's and datasets' progress bars and remarks out of the display; errors are raised, not printed."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets")]
    levels = [logger.level for logger in loggers]
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with redirect_stderr(StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
