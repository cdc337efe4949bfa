"""The memory that an action takes in a process of its own, without mapped weights and the disk's cache."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path


def anonymous() -> float:
    """Return the memory of this process's own, in 10⁶ bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1e3


def peak_of(action: Callable[[], object]) -> float:
    """Return the most memory that an action takes beyond what there was before, in 10⁶ bytes."""
    before, peak, done = anonymous(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        action()
    finally:
        done.set()
        watcher.join()
    return peak - before


def printed_by(script: str, folder: Path, *words: str) -> str:
    """Run a script in a new process in `folder`, which may import from here, and return what it prints."""
    found = filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(found)}
    command = [sys.executable, "-c", script, *words]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
