"""Write sections of the manual between two markers of a page."""
from pathlib import Path
from typing import Sequence

PAGES = Path(__file__).resolve().parent.parent / 'docs' / 'pages'
FIGURES = '../../benchmarks/results'  # relative to a page; docs/hooks.py copies the figures into the built manual


def write_section(page: Path, begin: str, end: str, lines: Sequence[str]) -> None:
    """Replace the lines between two markers of a page.

    Args:
        page: Markdown file.
        begin: First marker, a line of its own.
        end: Last marker, a line of its own.
        lines: New lines between them.

    Raises:
        SystemExit: The page lacks a marker.
    """
    text = page.read_text()
    if begin not in text or end not in text:
        raise SystemExit(f"{page}: needs the lines '{begin}' and '{end}' around the section.")
    before, rest = text.split(begin, 1)
    page.write_text('\n'.join([before + begin, *lines, end + rest.split(end, 1)[1]]))
