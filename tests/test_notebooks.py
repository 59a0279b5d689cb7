"""docs/notebooks: small, executed, with pictures; .ci/full executes them again."""
import os
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / 'docs' / 'notebooks').glob('*.ipynb'))
by_file = pytest.mark.parametrize('file', NOTEBOOKS, ids=lambda file: file.stem)


@by_file
def test_a_notebook_is_small_and_shows_its_results(file):
    text = file.read_text()
    assert file.stat().st_size < 400_000
    assert text.count('"image/png"') >= 2
    assert '"output_type": "error"' not in text
    counts = [int(n) for n in re.findall(r'"execution_count": (\d+)', text)]
    assert counts and set(counts) == set(range(1, max(counts) + 1))  # executed from top to bottom
    assert not re.search(r'/(?:home|root|tmp|work|Users)/', text)


@pytest.mark.slow
@pytest.mark.skipif('TIMM_SSCL_FULL' not in os.environ, reason='takes minutes: .ci/full')
@by_file
def test_a_notebook_runs(file, tmp_path):
    nbformat = pytest.importorskip('nbformat', reason='the extra `examples` is not installed')
    nbclient = pytest.importorskip('nbclient', reason='the extra `examples` is not installed')
    pytest.importorskip('ipykernel', reason='the extra `examples` is not installed')
    notebook = nbformat.read(file, as_version=4)
    nbclient.NotebookClient(notebook, timeout=1200, resources={'metadata': {'path': str(tmp_path)}}).execute()
    pictures = [out for cell in notebook.cells for out in cell.get('outputs', ())
                if 'image/png' in out.get('data', {})]
    assert len(pictures) >= 2
