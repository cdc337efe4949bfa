"""A merge simulator: the quickstart's models as 300 of their merges were really scored, so that a search takes seconds.

    python benchmarks/simulator.py collect [--recipes 300]     # hours to minutes; goes on where it stopped

`collect` scores recipes on the quickstart's search questions and keeps which question each got right: half of them
from a scrambled Sobol sequence over the whole box, half normally distributed (0.25) around the uniform merge, where
searches spend their time.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import qmc

from llmevo.config import read_config
from llmevo.errors import CandidateError
from llmevo.rig import Rig
from llmevo.space import SearchSpace

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yml"
TABLE = Path(__file__).parent / "results" / "quickstart-recipes.jsonl"
SPREAD = 0.25
"""Standard deviation of the recipes around the uniform merge, in shares of a gene's range."""

Point = NDArray[np.float64]


def points(space: SearchSpace) -> Iterator[Point]:
    """Recipes to score, in unit coordinates: in turns anywhere and around the uniform merge."""
    anywhere = qmc.Sobol(len(space.genes), seed=0)
    random = np.random.default_rng(0)
    middle = space.to_unit(space.uniform())
    while True:
        yield anywhere.random(1)[0]
        yield np.clip(middle + SPREAD * random.standard_normal(len(middle)), 0.0, 1.0)


def collect(options: argparse.Namespace) -> None:
    """Score what the table lacks, a line for each recipe."""
    rig = Rig(read_config(QUICKSTART), QUICKSTART.parent)
    done = len(TABLE.read_text().splitlines()) if TABLE.exists() else 0
    with TABLE.open("a") as out:
        for number, point in zip(range(options.recipes), points(rig.space), strict=False):
            if number < done:
                continue
            genes = {name: round(value, 4) for name, value in rig.space.from_unit(point).items()}
            line: dict[str, Any] = {"genes": [*genes.values()]}
            try:
                score, seconds = rig.score(rig.space.decode(genes))
            except CandidateError as error:
                line["failed"] = str(error)
            else:
                rights = {task: "".join(str(int(v)) for v in values) for task, values in score.item_scores.items()}
                line |= {"right": rights}
                print(f"{number + 1}/{options.recipes}: {score.total:.3f} in {sum(seconds.values()):.1f} s", flush=True)
            out.write(json.dumps(line) + "\n")
            out.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    collecting = commands.add_parser("collect", help="score real recipes; goes on where it stopped")
    collecting.add_argument("--recipes", type=int, default=300)
    collecting.set_defaults(command=collect)
    options = parser.parse_args()
    options.command(options)


if __name__ == "__main__":
    main()
