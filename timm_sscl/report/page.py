"""Write a report: one HTML file that needs no other, and its pictures as PNG files."""
import base64
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

from .extra import from_extra

__all__ = ['Section', 'Table', 'render_page']

_DPI = 100


@dataclass
class Table:
    """Rows of text below a head."""
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass
class Section:
    """A part of a report.

    Attributes:
        title: Heading.
        text: Paragraphs.
        figures: File name -> matplotlib figure.
        tables: Tables.
        details: Heading -> preformatted text that is folded away.
        open: Whether the tables are shown unfolded.
    """
    title: str
    text: List[str] = field(default_factory=list)
    figures: Dict[str, Any] = field(default_factory=dict)
    tables: List[Table] = field(default_factory=list)
    details: Dict[str, str] = field(default_factory=dict)
    open: bool = True


def render_page(title: str, status: str, sections: Sequence[Section]) -> Tuple[str, Dict[str, bytes]]:
    """Return a report as HTML, and its pictures: file name -> PNG.

    Args:
        title: Title of the page.
        status: One line below it.
        sections: What the report holds.

    Raises:
        ImportError: matplotlib or jinja2 is not installed.
    """
    pictures = {name: _png(figure) for section in sections for name, figure in section.figures.items()}
    environment = from_extra('jinja2').Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((Path(__file__).with_name('page.html')).read_text())

    def inline(name: str) -> str:
        return 'data:image/png;base64,' + base64.b64encode(pictures[name]).decode()

    return template.render(title=title, status=status, sections=sections, inline=inline), pictures


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format='png', dpi=_DPI)
    return file.getvalue()
