"""A comparison in words and tables, the same in the terminal, on the page and in comparison.md."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table as RichTable

from llmevo.errors import UserError, plural
from llmevo.models.files import write_whole
from llmevo.reports.comparison.chart import draw
from llmevo.reports.comparison.compare import Comparison, Optimizer, Pair
from llmevo.reports.comparison.statistics import LEVEL, Mean, enough, holm
from llmevo.reports.text import with_error


@dataclass(frozen=True)
class Table:
    """Rows of text under a title, with a note that explains them."""

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def rich(self) -> RichTable:
        table = RichTable(title=self.title, caption=self.note, box=None, pad_edge=False)
        table.title_justify = table.caption_justify = "left"
        table.title_style = "bold"
        for place, name in enumerate(self.header):
            table.add_column(name, justify="right" if place else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        cells = [[cell.replace("|", "\\|") for cell in row] for row in (self.header, *self.rows)]
        lines = [cells[0], ["---", *["---:"] * (len(self.header) - 1)], *cells[1:]]
        return "\n".join([f"## {self.title}", "", *("| " + " | ".join(line) + " |" for line in lines), "", self.note])


def tables(comparison: Comparison) -> list[Table]:
    """Return all tables; those of LLM and judges only where there are any."""
    found = [scores(comparison), pairs(comparison), llm(comparison), judges(comparison)]
    return [table for table in found if table.rows]


def scores(comparison: Comparison) -> Table:
    """Return the scores of each optimizer, and those of the models it has to beat."""
    reference, held = comparison.reference, comparison.final == "heldout"
    header = ["optimizer", "seeds", *(["held-out", "questions"] if held else []), "search"]
    header += [f"reaches {reference}'s after"] if reference else []
    rows = [
        [
            of.name,
            str(len(of.seeds)),
            *([_mean(of.heldout), "" if of.heldout_stderr is None else f"± {of.heldout_stderr:.3f}"] if held else []),
            _mean(of.search),
            *([_reached(of, comparison.budget)] if reference else []),
        ]
        for of in comparison.optimizers
    ]
    rows += [[name, "", f"{score:.3f}", *[""] * (len(header) - 3)] for name, score in comparison.rows.items()]
    note = f"Means over seeds ± their standard error, after {plural(comparison.budget, 'evaluation')}."
    if reference:
        note += (
            f" “reaches {reference}'s after”: the median of the evaluations until {reference}'s final search score on"
            " the same seed, and the number of seeds that reach it."
        )
    if held:
        note += " “questions”: the standard error from the choice of held-out questions, which more seeds do not lower."
    else:
        note += " There are no held-out questions: search scores are the best of many and flatter."
    if lacking := [run.folder for run in comparison.runs if held and run.heldout is None]:
        note += f" The best of {', '.join(lacking)} has no held-out score: the mean is over the other seeds."
    if missed := [run.folder for run in comparison.runs if run.violated]:
        note += f" No candidate keeps all constraints in {', '.join(missed)}: the scores are of those that miss least."
    return Table("Scores", note, header, rows)


def _reached(of: Optimizer, budget: int) -> str:
    if not of.reached:
        return ""
    count = sum(place is not None for place in of.reached.values())
    median = f"> {budget}" if of.median_reached is None else f"{of.median_reached:g}"
    return f"{median} ({count} of {len(of.reached)})"


def pairs(comparison: Comparison) -> Table:
    """Return every two optimizers, on the questions that decide."""
    header = ["first", "second", "won-tied-lost", "won", "difference", "p", "p, Holm"]
    chosen = [pair for pair in comparison.pairs if pair.questions == comparison.final]
    rows = [
        [
            *(pair.first, pair.second),
            f"{pair.result.wins}-{pair.result.ties}-{pair.result.losses}",
            f"{pair.win_rate:.0%}",
            _mean(pair.result.difference, sign="+"),
            *(_p(pair.result.p), _p(pair.p_holm)),
        ]
        for pair in chosen
    ]
    kind = "held-out scores" if comparison.final == "heldout" else "search scores"
    tests = ", ".join(dict.fromkeys(pair.result.test for pair in chosen))
    note = f"First minus second in {kind}, seed by seed. Two-sided p ({tests}), also corrected for several pairs."
    return Table("Against each other", f"{note} {conclusion(chosen)}", header, rows)


def conclusion(chosen: Sequence[Pair]) -> str:
    """Return the conclusion in one sentence."""
    least = min(holm([pair.result.least for pair in chosen]), default=1.0)
    if least >= LEVEL:
        corrected = " after correction" if len(chosen) > 1 else ""
        return (
            f"Nothing here is conclusive: with so few seeds no p{corrected} can be below {least:.2g}, whatever the"
            f" scores; take {enough(max(1, len(chosen)))} or more."
        )
    clear = [pair for pair in chosen if pair.p_holm < LEVEL]
    if not clear:
        return f"No difference is significant at {LEVEL:.2f}."
    words = (" over ".join((p.first, p.second) if p.result.difference.mean > 0 else (p.second, p.first)) for p in clear)
    return f"Significant at {LEVEL:.2f} after correction: {'; '.join(words)}."


def llm(comparison: Comparison) -> Table:
    """Return the calls and proposals of the LLM."""
    header = ["optimizer", "calls", "lost", "unusable", "scored", "share", "won", "tokens", "cost", "seconds"]
    rows = [
        [
            of.name,
            *(f"{of.llm[key]:g}" for key in ("calls", "lost", "unreadable", "used")),
            *(f"{of.llm[key]:.0%}" for key in ("share", "best")),
            f"{of.llm['prompt_tokens']:,.0f}+{of.llm['completion_tokens']:,.0f}",
            *(f"{of.llm[key]:.4g}" for key in ("cost", "seconds")),
        ]
        for of in comparison.optimizers
        if of.llm
    ]
    note = (
        "Sums over the seeds. “scored”: its proposals that became candidates, “share” of all after the start rows;"
        " “won”: the runs whose best is one of them; tokens read + written."
    )
    return Table("The LLM", note, header, rows)


def judges(comparison: Comparison) -> Table:
    """Return the verdicts and calls of LLM judges."""
    header = ["optimizer", "verdicts", "calls", "tokens", "cost"]
    rows = [
        [of.name, f"{bill.verdicts:,}", f"{bill.calls:,}", f"{bill.read:,}+{bill.written:,}", f"{bill.cost:.4g}"]
        for of in comparison.optimizers
        if (bill := of.judged).verdicts
    ]
    note = "Sums over the seeds, held-out replies included. Tokens read + written."
    return Table("The judges", note, header, rows)


def markdown(comparison: Comparison, picture: str) -> str:
    """Return the text of comparison.md."""
    seeds = sorted({run.seed for run in comparison.runs})
    told = f"{plural(len(comparison.runs), 'run')} of {plural(comparison.budget, 'evaluation')},"
    told += f" {comparison.start_rows} of them start rows"
    told += f"; seeds {', '.join(map(str, seeds))}; {plural(comparison.items, 'question')} a candidate"
    told += f", {comparison.heldout_items} held out." if comparison.heldout_items else "."
    parts = ["# Optimizers compared", told, f"![best score so far and final scores]({picture})"]
    parts += [table.markdown() for table in tables(comparison)]
    parts += ["## Runs", "\n".join(f"- `{run.folder}`" for run in comparison.runs)]
    return "\n\n".join(parts) + "\n"


def publish(comparison: Comparison, out: Path) -> str:
    """Write comparison.json, comparison.png and comparison.md, each as a whole or not at all. Return the first. Raises
    UserError where they cannot be written.
    """
    numbers = json.dumps(comparison.as_dict(), indent=1, allow_nan=False)
    picture, text = draw(comparison), markdown(comparison, "comparison.png")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "comparison.json", f"{numbers}\n".encode())
        write_whole(out / "comparison.png", picture)
        write_whole(out / "comparison.md", text.encode(errors="replace"))  # a folder's name may be no UTF-8
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); name another folder with --out") from error
    return numbers


def _mean(mean: Mean | None, sign: str = "") -> str:
    return with_error(mean.mean, mean.stderr, sign) if mean else ""


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
