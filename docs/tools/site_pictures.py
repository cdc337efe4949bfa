"""Pictures of the site's pages in headless Chromium, light and dark, on a screen and on a phone.

make docs && PYTHONPATH=tests python docs/tools/site_pictures.py [PAGE…] [--out docs/pictures]
"""

import argparse
import threading
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from support.browser import browser

SITE = Path(__file__).parents[2] / "build" / "site"
PAGES = ("index", "guides/tasks", "reference/config", "methods/ties", "compare")
WIDTHS = {"screen": 1280, "phone": 390}


class Quiet(SimpleHTTPRequestHandler):
    """A server that prints no line for each request."""

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def served(folder: Path) -> Generator[str]:
    """The address of a folder, served on this machine: the search needs a server."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="*", default=PAGES)
    parser.add_argument("--out", type=Path, default=SITE.parent / "pictures")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with served(SITE) as address:
        for theme in ("light", "dark"):
            with browser() as page:  # a new one: the site remembers its theme
                for place in given.pages:
                    for kind, width in WIDTHS.items():
                        page.resize(width, dark=theme == "dark")
                        page.driver.get(f"{address}/{place}.html")
                        page.wait("document.readyState === 'complete'")
                        file = given.out / f"{place.replace('/', '-')}-{kind}-{theme}.png"
                        page.driver.save_screenshot(str(file))
                        print(file)


if __name__ == "__main__":
    main()
