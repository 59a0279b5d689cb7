"""Runs of train.py with losses that have memories, masks or membranes: on two processes, stopped and resumed."""
import signal

import pytest
import torch
from timm.utils.checkpoint_saver import load_checkpoint_metadata

from runs import rows_of, same_runs

LOSSES = 'crd=0.1,bkdsnn=0.1,meom=0.1,im=0.01,rmp=0.1,seal_kd=0.1'
ARGS = ['--model', 'spiking_test_resnet', '-T', '2', '--epochs', '3', '--teacher-epochs', '1', '--warmup-epochs', '0',
        '--train-num-samples', '64', '--val-num-samples', '16', '--batch-size', '8', '--workers', '0', '--threads', '1',
        '--output', 'out', '--experiment', 'run', '--resume', 'auto', '--lr', '0.01', '--loss', LOSSES,
        '--loss-kwargs', 'crd.num_negatives=32', 'crd.dim=16', '--checkpoint-hist', '1']
STOP = '''
import logging, os

class Stop(logging.Handler):
    def emit(self, record):
        if 'student epoch 2/3 validation' in record.getMessage():
            logging.getLogger('train').removeHandler(self)
            os.kill(os.getpid(), 15)

logging.getLogger('train').addHandler(Stop())
'''
pytestmark = pytest.mark.slow  # starts processes


def test_memories_of_two_processes_are_those_of_all_samples_and_go_on_exactly(server, tmp_path):
    whole, stopped = tmp_path / 'whole', tmp_path / 'stopped'
    code, log = server.run(ARGS, whole, processes=2)
    assert code == 0, log
    code, log = server.run(ARGS, stopped, processes=2, setup=STOP)
    assert code == 128 + signal.SIGTERM, log
    code, log = server.run(ARGS, stopped, processes=2)
    assert code == 0, log
    same_runs(whole / 'out', stopped / 'out')
    losses = load_checkpoint_metadata(str(whole / 'out/run/last.pth.tar'))['task_state']['losses']
    assert (losses['crd.labels'] >= 0).all()  # both processes' samples, all seen in an epoch
    norms = torch.linalg.vector_norm(losses['crd.teacher_bank'], dim=1)
    torch.testing.assert_close(norms, torch.ones(64))  # all moved at least once, so normalised
    rows = rows_of(whole / 'out/run')
    assert float(rows[0]['train_rmp_loss']) == 0. and float(rows[2]['train_rmp_loss']) > 0.  # grows from 0
