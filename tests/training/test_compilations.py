"""What torch.compile compiles in a training: nothing twice, and not counted as training time."""
import logging
import re

import pytest
import timm
import torch

from runs import TINY, run_here
from timm_sscl.neurons import lif_backend
from timm_sscl.neurons.kernels.backend import _compiled
from timm_sscl.training.steps.compiling import CompileClock
from timm_sscl.training.steps.loop import begin_epoch, end_step


@pytest.fixture
def fresh_compiler():
    """Without code that other tests have compiled."""
    torch._dynamo.reset()
    _compiled.cache_clear()


def test_nothing_is_compiled_again_for_other_batch_sizes_modes_and_timesteps(fresh_compiler):
    torch.manual_seed(0)
    model = timm.create_model('spiking_test_resnet', timesteps=2, num_classes=3)
    images = torch.randn(6, 3, 32, 32)

    def epoch():
        model.train()
        for batch in (images, images, images[:5]):  # the last batch is smaller
            model(batch).sum().backward()
        model.eval()
        with torch.no_grad():
            for batch in (images, images[:3]):
                model(batch)

    with lif_backend('compiled'), CompileClock() as clock:
        counts = []
        for timesteps in (2, 2, 3, 2, 3):
            model.set_timesteps(timesteps)
            epoch()
            counts.append(clock.count)
    first, again, other, back, other_again = counts
    assert 0 < first == again < other == back == other_again
    assert other - first <= first  # as much for another T as for the first


def test_a_compilation_is_said_once_and_its_time_is_counted(caplog):
    caplog.set_level(logging.INFO, logger='train')
    clock = CompileClock('a function')
    function = torch.compile(lambda x: x + 1, backend='eager', dynamic=False)
    torch._dynamo.reset()
    with clock:
        for size in (2, 3, 3, 4):
            function(torch.zeros(size))
    function(torch.zeros(5))  # outside
    with clock:
        function(torch.zeros(6))
    assert clock.count == 4 and clock.seconds > 0
    assert [record.getMessage().count('Compiling a function') for record in caplog.records] == [1]


def test_time_of_compilations_is_left_out_of_the_rate_and_the_time_left(fit, caplog):
    caplog.set_level(logging.INFO, logger='train')
    training = fit([])
    progress = begin_epoch(training, 0)
    hour = 3600.
    progress.began -= hour  # the epoch began an hour ago and compiled all the time
    training.started -= hour
    training.compiling.seconds += hour
    images = torch.zeros(5, 1)
    end_step(training, progress, progress.steps - 1, images, stop=False)
    assert training.images_done == 5 and 0 < training.seconds < hour / 2
    line = next(record.getMessage() for record in caplog.records if 'img/s' in record.getMessage())
    hours = int(re.search(r'ETA (?:\d+ days?, )?(\d+):', line)[1])
    # one step of an hour for each of those left would be more hours than there are such steps
    assert 'days' not in line and hours < progress.steps * (training.epochs - 1), line


def test_a_training_that_compiles_says_so(tmp_path, monkeypatch, caplog, fresh_compiler):
    caplog.set_level(logging.INFO, logger='train')
    with lif_backend('compiled'):
        run_here([*TINY, '--epochs', '1', '--distill', 'none', '--output', 'out'], tmp_path, monkeypatch)
    said = [record.getMessage().split(':')[0] for record in caplog.records if 'Compiling' in record.getMessage()]
    assert said == ['Compiling neurons to measure their gains', 'Compiling neurons for the training']
