"""docs/examples/loops: SSCLLoss in the loops of others. Those of packages that are not installed are skipped."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOOPS = ROOT / 'docs' / 'examples' / 'loops'
NEEDS = {'lightning_module': 'lightning', 'segmentation': 'segmentation_models_pytorch'}


def _run(script, *args, launcher=(), cwd):
    """What a script prints as a user starts it."""
    done = subprocess.run([sys.executable, *launcher, LOOPS / script, *args], cwd=cwd, capture_output=True, text=True,
                          timeout=1200, env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(cwd.iterdir())  # leaves nothing behind
    return [float(x) for x in re.findall(r'spiking.* (\d+\.\d) %', done.stdout)]


@pytest.mark.parametrize('script', sorted(LOOPS.glob('*.py')), ids=lambda file: file.stem)
def test_examples_are_short_and_compile(script):
    assert len(script.read_text().splitlines()) < 80
    compile(script.read_text(), str(script), 'exec')


@pytest.mark.slow
def test_plain_ddp(tmp_path):
    torchrun = '-m', 'torch.distributed.run', '--nproc_per_node', '2'
    whole = 'TIMM_SSCL_FULL' in os.environ  # .ci/full
    accuracy, = _run('ddp_amp_accumulation.py', *(() if whole else ('--epochs', '1')), launcher=torchrun, cwd=tmp_path)
    # 10 classes: an untrained network has 10 %, within 5 on 360 images
    assert not whole or accuracy > 60


@pytest.mark.slow
@pytest.mark.parametrize('script, args', [
    ('lightning_module', ()), ('lightning_module', ('--devices', '2')), ('segmentation', ())])
def test_with_other_packages(script, args, tmp_path):
    pytest.importorskip(NEEDS[script], reason='the extra `examples` is not installed')
    values = _run(f'{script}.py', *args, cwd=tmp_path)
    # accuracy of 10 classes, printed by every process; mean IoU of 3 classes, which background alone cannot reach
    assert values and min(values) > 60
