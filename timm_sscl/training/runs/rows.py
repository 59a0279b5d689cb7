"""Append rows to a CSV file that is never partly written."""
import csv
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping

from ..saving.checkpoint import replacing

__all__ = ['append_row', 'keep_rows']


def append_row(file: Path, row: Mapping[str, Any]) -> None:
    """Append a row. In earlier rows, new columns are empty.

    Args:
        file: CSV file; created if missing.
        row: Column -> value.
    """
    _write(file, [*_read(file), dict(row)])


def keep_rows(file: Path, keep: Callable[[Dict[str, str]], bool]) -> None:
    """Remove the rows for which keep(row) is False, and rows that another program's kill cut off."""
    rows = _read(file)
    kept = [row for row in rows if None not in row.values() and None not in row and keep(row)]
    if len(kept) != len(rows):
        _write(file, kept)


def _read(file: Path) -> List[Dict[str, Any]]:
    if not file.exists():
        return []
    with open(file, newline='') as f:
        return list(csv.DictReader(f))


def _write(file: Path, rows: List[Dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with replacing(file) as aside, open(aside, 'w', newline='') as f:
        writer = csv.DictWriter(f, columns, restval='')
        writer.writeheader()
        writer.writerows(rows)
