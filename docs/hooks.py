"""MkDocs hook: the figures that pages show lie in benchmarks/results and are copied into the built manual from there.

A page links them as `../../benchmarks/results/NAME.png`, which also works where the Markdown file is read by itself.
"""
from pathlib import Path

from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).resolve().parent.parent / 'benchmarks' / 'results'
LINK, TARGET = '../../benchmarks/results/', 'figures/'


def on_files(files: Files, config, **kwargs) -> Files:
    """Add every figure to the files of the manual."""
    for figure in sorted(RESULTS.glob('*.png')):
        files.append(File.generated(config, TARGET + figure.name, abs_src_path=str(figure)))
    return files


def on_page_markdown(markdown: str, **kwargs) -> str:
    """Point a page's figures at their copies."""
    return markdown.replace(f']({LINK}', f']({TARGET}')
