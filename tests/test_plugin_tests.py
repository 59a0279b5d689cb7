"""`pytest --plugin=FILE` runs the tests of every neuron, norm, residual and loss for what a user's file registers."""
import re
import subprocess
import sys

import pytest

from runs import ROOT

SUITES = [f'tests/{path}.py' for path in ('neurons/test_every_neuron', 'conversion/test_every_variant',
                                          'losses/test_every_loss')]
MISTAKES = '''
import torch
from timm_sscl import SpikingNeuron, register_neuron

@register_neuron('blends_samples')
class BlendsSamples(SpikingNeuron):
    """A neuron with a mistake: samples of a batch are not apart."""

    @staticmethod
    def step(x, state, constants, t, settings):
        return settings.spike(x - x.mean(), 1.), ()
'''


def _pytest(*args):
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-n0', '-p', 'no:cacheprovider', *args, *SUITES], cwd=ROOT,
        capture_output=True, text=True, timeout=600)
    return result.returncode, result.stdout + result.stderr


@pytest.mark.slow
def test_a_users_file(tmp_path):
    (tmp_path / 'own.py').write_text(MISTAKES)
    code, log = _pytest(
        f'--plugin={ROOT}/docs/examples/plugins/all_seams.py', f'--plugin={tmp_path}/own.py', '-vv', '-m',
        'not families and not slow', '-k', 'learnt_decay or norm-scaled or sparse or blends_samples')
    passed, failed = (set(re.findall(rf'::(\S+) {word}', log)) for word in ('PASSED', 'FAILED'))
    assert code == 1 and failed and all('blends_samples' in name for name in failed), log[-3000:]
    assert 'test_a_batch_is_its_samples_in_any_order[blends_samples]' in failed
    for name in 'learnt_decay', 'norm-scaled', 'sparse':
        assert sum(name in test for test in passed) >= 5, name
    assert 'test_model_trains_and_its_checkpoint_restores_all[learnt_decay]' in passed


@pytest.mark.slow
def test_a_file_that_does_not_exist():
    code, log = _pytest('--plugin=nowhere.py', '--collect-only')
    assert code == 4 and "ERROR: --plugin: 'nowhere.py' does not exist." in log
