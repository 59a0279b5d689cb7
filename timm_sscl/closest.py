"""The known names that are closest to a misspelt one, for error messages."""
import difflib
from typing import Iterable, List

__all__ = ['closest']


def closest(name: str, known: Iterable[str], n: int = 1) -> List[str]:
    """Return at most n known names that are similar to a name, the closest first; [] if none is.

    Names that share enough of their letters (difflib) are ranked by the number of single edits between them: a letter
    more, less or another one, or two neighbours that changed places. Capitals count as small letters.
    """
    by_lower = {other.lower(): other for other in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=max(10, n))
    return [by_lower[other] for other in sorted(found, key=lambda other: _edits(name.lower(), other))[:n]]


def _edits(a: str, b: str) -> int:
    """Return the number of single edits from a to b (Damerau's distance, restricted to neighbours)."""
    before, row = [0] * (len(b) + 1), list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        before, last, row = row, before, [i]
        for j, other in enumerate(b, 1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != other)))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                row[j] = min(row[j], last[j - 2] + 1)
    return row[-1]
