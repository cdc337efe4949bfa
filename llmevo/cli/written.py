"""What the commands say of models and adapters that they have written."""

from typing import TYPE_CHECKING

from rich.table import Table

from llmevo.cli import terminal

if TYPE_CHECKING:  # torch takes seconds to import
    from llmevo.export.formats import Written
    from llmevo.export.lora import LoraReport

WORST = 8
"""Matrices that are listed."""
SHOWN = 0.0005
"""The least error that is not printed as 0.000; without one there is no list."""


def print_written(written: "Written") -> None:
    """Print what was written, and how near an adapter is."""
    terminal.console.print(written.done, soft_wrap=True)
    if written.report:
        print_report(written.report)


def print_report(report: "LoraReport") -> None:
    """Print the kept energy and the error of an adapter, the matrices with the largest error, and its limits."""
    kept = "exact" if report.exact else f"{report.energy:.2%} of the squared singular values"
    terminal.console.print(f"{kept}, relative error {report.error:.3g}: {report.size}", soft_wrap=True)
    if any(of.error >= SHOWN for of in report.matrices.values()):
        table = Table(box=None, pad_edge=False)
        table.add_column("matrices with the largest error", overflow="fold")
        for column in ("rank", "kept energy", "error", "change"):
            table.add_column(column, justify="right")
        for module, of in report.worst[:WORST]:
            table.add_row(module, str(of.rank), f"{of.energy:.1%}", f"{of.error:.3f}", f"{of.change:.2%}")
        terminal.console.print(table)
    for limit in report.limits:
        terminal.console.print(f"{limit}.", style="yellow", soft_wrap=True)
