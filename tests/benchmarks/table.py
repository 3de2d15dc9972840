"""What was measured, as a CSV file that a later measurement renews in part."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

Rows = list[dict[str, str]]


def read(path: Path) -> Rows:
    """The lines of a file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def renew(path: Path, columns: Sequence[str], names: Sequence[str], measure: Callable[[], Rows]) -> Rows:
    """Measure some of the things that a file holds, replace their lines, and keep the others.

    Args:
        path: The file.
        columns: Of the file. The first one names what a line is about.
        names: What is measured.
        measure: Does it, and returns the lines.

    Returns:
        All lines of the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)  # before hours are spent on what could not be written
    measured = measure()
    rows = [row for row in read(path) if row[columns[0]] not in names] + measured
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return rows
