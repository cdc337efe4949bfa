"""axe-core, which checks pages against the Web Content Accessibility Guidelines; npm has it."""

import base64
import hashlib
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from support.browser import Page

VERSION = "4.14.1"
DIGEST = "FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ=="
"""SHA-512 of the package, as npm lists it."""
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]


def axe(folder: Path) -> str:
    """Return the script; skips the test where npm cannot fetch it."""
    npm = shutil.which("npm")
    if not npm:
        pytest.skip("npm is not installed; it fetches axe-core")
    command = [npm, "pack", f"axe-core@{VERSION}", "--silent", "--pack-destination", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=120, cwd=folder)
    except (subprocess.SubprocessError, OSError) as error:
        pytest.skip(f"npm cannot fetch axe-core {VERSION} ({error})")
    package = folder / f"axe-core-{VERSION}.tgz"
    assert base64.b64encode(hashlib.sha512(package.read_bytes()).digest()).decode() == DIGEST
    with tarfile.open(package) as archive:
        member = archive.extractfile("package/axe.min.js")
        assert member
        return member.read().decode()


def violations(page: Page, script: str) -> list[str]:
    """Return what is wrong with a page by WCAG 2.2, levels A and AA: the rule and the elements."""
    command = {"expression": f"{script};undefined", "returnByValue": True}  # past the page's policy, as a debugger may
    page.driver.execute_cdp_cmd("Runtime.evaluate", command)
    options = f"{{runOnly: {RULES}, resultTypes: ['violations']}}"
    answer: dict[str, Any] = page.driver.execute_cdp_cmd(
        "Runtime.evaluate",
        {
            "expression": f"axe.run(document, {options}).then(found => found.violations.map("
            "v => `${v.id}: ${v.nodes.slice(0, 4).map(n => `${n.html.slice(0, 200)} (${n.failureSummary})`)"
            ".join(' | ')}`))",
            "awaitPromise": True,
            "returnByValue": True,
        },
    )
    assert "exceptionDetails" not in answer, answer
    return answer["result"]["value"]
