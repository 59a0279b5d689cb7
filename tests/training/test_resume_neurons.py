"""Runs with neurons, norms and residuals with a state of their own end alike, killed twice or never."""
import pytest
from timm.utils.checkpoint_saver import load_checkpoint_metadata

from runs import run_killed, same_runs

pytestmark = pytest.mark.slow  # trains in processes that are killed
RUN = ['--model', 'spiking_test_resnet', '-T', '2', '--img-size', '32', '--epochs', '3', '--teacher-epochs', '1',
       '--warmup-epochs', '0', '--train-num-samples', '48', '--val-num-samples', '16', '--batch-size', '8',
       '--workers', '0', '--threads', '1', '--output', 'out', '--experiment', 'run', '--resume', 'auto',
       '--recovery-interval', '1', '--lr', '0.02', '--log-interval', '100', '--model-ema', '--checkpoint-hist', '2']
# rates and parameters per timestep of their own; a mask that follows the epochs; norms inside neurons, analog stages
CASES = {
    'glif-tebn': ['--neuron', 'glif', '--norm', 'tebn'],
    'masked_psn-tab-sew': ['--neuron', 'masked_psn', '--neuron-kwargs', 'mask_warmup=0.6', '--norm', 'tab',
                           '--residual', 'sew'],
    'evaf-mpbn-ms': ['--surrogate', 'evaf', '--norm', 'mpbn', '--residual', 'ms'],
}


@pytest.mark.parametrize('case', CASES)
def test_killed_twice(case, server, tmp_path):
    args, folders = [*RUN, *CASES[case]], [tmp_path / 'whole', tmp_path / 'killed']
    for folder, kills in zip(folders, (0, 2)):
        run_killed(server, args, folder, kills)
    same_runs(*folders)
    state = load_checkpoint_metadata(str(folders[1] / 'out' / 'run' / 'last.pth.tar'))['state_dict']
    own = {'glif-tebn': 'bn1.step_scale', 'masked_psn-tab-sew': 'act1.mask_progress',
           'evaf-mpbn-ms': 'layer4.act.membrane_norm.weight'}[case]
    assert own in state
