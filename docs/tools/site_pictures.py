"""Pictures of the site's pages in headless Chromium, light and dark, at a screen's and a phone's width.

make docs && PYTHONPATH=tests python docs/tools/site_pictures.py [PAGE…] [--out build/pictures]
"""

import argparse
from pathlib import Path

from support.browser import browser

SITE = Path(__file__).parents[2] / "build" / "site"
PAGES = ("index", "getting-started", "guides/tasks", "reference/config", "methods/ties", "compare")
WIDTHS = {"screen": 1280, "phone": 390}
PALETTE = "localStorage.clear()"
"""Forgets the palette that a visitor chose, so that the system's theme decides."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="*", default=PAGES)
    parser.add_argument("--out", type=Path, default=SITE.parent / "pictures")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with browser() as page:
        for place in given.pages:
            for kind, width in WIDTHS.items():
                for theme in ("light", "dark"):
                    page.resize(width, dark=theme == "dark")
                    page.driver.get((SITE / f"{place}.html").as_uri())
                    page.wait("document.readyState === 'complete'")
                    file = given.out / f"{place.replace('/', '-')}-{kind}-{theme}.png"
                    page.driver.save_screenshot(str(file))
                    print(file)


if __name__ == "__main__":
    main()
