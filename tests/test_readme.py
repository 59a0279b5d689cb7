"""README's code runs as it stands, and its options exist."""
import re
import sys
from pathlib import Path

import pytest

from timm_sscl.losses import factory
from timm_sscl.options import UNSUPPORTED, create_parser

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'benchmarks'))

import ablation  # noqa: E402

README = (Path(__file__).resolve().parent.parent / 'README.md').read_text()
BLOCKS = re.findall(r'```python\n(.*?)```', README, re.S)


@pytest.mark.parametrize('code', BLOCKS, ids=lambda code: code.strip().splitlines()[-1][:40])
def test_code_runs(code, capsys, monkeypatch):
    monkeypatch.setattr(factory, '_losses', dict(factory._losses))  # what a block registers does not stay
    exec(compile(code, 'README.md', 'exec'), {})
    losses = [float(x) for x in re.findall(r'loss (\d+\.\d+)', capsys.readouterr().out)]
    if 'SSCLLoss(student' in code:
        assert len(code.splitlines()) <= 22 and len(losses) == 8
        # the second pass over the same images is better than the first; step 0 has the weights of a single batch's CKA
        assert sum(losses[5:]) < sum(losses[1:4])
    else:
        assert not losses


def test_every_option_that_readme_names_exists():
    parsers = create_parser(), ablation.create_parser()
    known = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    launchers = {'--multi_gpu', '--num_processes', '--nproc_per_node', '--cpu', '--mixed_precision'}
    named = set(re.findall(r'--[a-z][a-z_-]+', README))
    assert len(named) > 30 and named - launchers <= known


def test_every_refused_option_is_in_differences_or_its_family_is():
    text = README.split('## Differences')[1]
    families = {'train_': '--train-img-sizes', 'variable_': '--train-img-sizes', 'naflex': 'NaFlex',
                'wandb': '--log-wandb', 'kd_': 'Feature and token distillation'}
    for name in UNSUPPORTED:
        stated = '--' + name.replace('_', '-') in text
        family = next((words for prefix, words in families.items() if name.startswith(prefix)), None)
        assert stated or (family and family in text), name
