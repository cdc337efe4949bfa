"""The pictures of `docs/guides/browser.md`, from the logs of `benchmarks/results/quickstart-llm`, by Chromium:

PYTHONPATH=tests python -m support.pictures
"""

import shutil
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from llmevo.run.log.storage import LOG, RunLog, read_log
from support.browser import Page, browser
from support.served import address, served

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
LOGS = ROOT / "benchmarks" / "results" / "quickstart-llm"
SHOWN = 34
"""Events of the run that goes on."""


def draw(page: Page, url: str, name: str, height: int, dark: bool = False) -> None:
    """Write a picture of a page that follows its log."""
    page.resize(1000, height, dark)
    page.driver.get(url)
    page.wait("document.documentElement.dataset.drawn && document.documentElement.dataset.seen")
    page.wait("!document.querySelector('main').textContent.includes('being read')")
    page.run("document.body.style.overflow = 'hidden'")
    with Image.open(BytesIO(page.driver.get_screenshot_as_png())) as picture:
        picture.convert("RGB").quantize(128).save(DOCS / f"{name}.png", optimize=True)


def main() -> None:
    with TemporaryDirectory() as folder:
        runs = Path(folder) / "runs"
        for seed in (1, 2):
            (runs / f"quickstart-{seed}").mkdir(parents=True)
            shutil.copy(LOGS / f"seed-{seed}.jsonl", runs / f"quickstart-{seed}" / LOG)
        with RunLog(runs / "quickstart-0") as writer, served(runs) as server, browser() as page:
            for event in read_log(LOGS / "seed-0.jsonl")[:SHOWN]:
                writer.append(event)
            for name, dark in (("serve-light", False), ("serve-dark", True)):
                draw(page, address(server, "runs/quickstart-0/"), name, 1260, dark)
            draw(page, address(server), "serve-list", 430)


if __name__ == "__main__":
    main()
