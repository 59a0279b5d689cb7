"""The manual's table of losses: it has every loss of the package, with its options and defaults."""
import re
from pathlib import Path

import pytest

from timm_sscl.losses import loss_spec

ROOT = Path(__file__).resolve().parents[2]
CELLS = [[cell.strip() for cell in re.split(r'(?<!\\)\|', line)[1:-1]]
         for line in (ROOT / 'docs/pages/loss.md').read_text().splitlines() if line.startswith('| `')]
ROWS = {cells[0].strip('`'): cells for cells in CELLS if len(cells) == 5}  # name, formula, source, options, needs
BUILT_IN = {name for file in (ROOT / 'timm_sscl/losses').glob('*.py') if file.name != 'registry.py'
            for name in re.findall(r"register_loss\(\s*'(\w+)'", file.read_text())}


def test_every_loss_has_a_row():
    assert BUILT_IN == set(ROWS) and len(BUILT_IN) > 20


def test_the_list_among_the_options_has_every_loss():
    text = (ROOT / 'docs/pages/options.md').read_text()
    table = text[text.index('The losses by name'):].split('\n\n')[1]
    assert sorted(re.findall(r'^\| `(\w+)` \|', table, re.M)) == sorted(BUILT_IN)


@pytest.mark.parametrize('name', sorted(BUILT_IN - {'contrastive'}))
def test_options_and_defaults(name):
    written = dict(re.match(r'`(\w+)(?:=([^`]*))?`', part).groups() for part in ROWS[name][3].split(', ') if part)

    def text(value):
        if isinstance(value, tuple):
            return ','.join(map(text, value))
        return f'{value:g}' if isinstance(value, float) else None if value is None else str(value)

    assert written == {option.name: text(option.default) for option in loss_spec(name).options.values()}


@pytest.mark.parametrize('name', sorted(BUILT_IN))
def test_needs(name):
    spec, needs = loss_spec(name), ROWS[name][4]
    for flag, word in (('needs_labels', 'labels'), ('needs_membranes', 'membranes'), ('needs_index', 'index'),
                       ('needs_firing_rates', 'firing rates'), ('needs_features', 'features'),
                       ('needs_teacher_head', 'classifier'), ('compares_classes', 'logits')):
        if not (flag == 'needs_labels' and spec.labels_if):
            assert getattr(spec, flag) == (word in needs), (flag, needs)
