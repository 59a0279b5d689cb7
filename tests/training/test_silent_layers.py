"""Layers that stop firing in training are named at the next log, and noting it does not wait for the device."""
import logging

import pytest
import torch
import torch.nn as nn
from processes import run_processes
from torch.utils._python_dispatch import TorchDispatchMode

from files import write_images
from runs import IMAGES, run_here
from timm_sscl import LIF
from timm_sscl.training.runs.silent_layers import SilentLayers


def model():
    return nn.ModuleDict({'a': LIF(2), 'b': LIF(2), 'c': LIF(2)}).train()


FIRES, SILENT = torch.ones(2, 3), torch.zeros(2, 3)


def test_layer_is_silent_where_it_ran_and_never_fired_since_the_last_call():
    net = model()
    with SilentLayers(net) as layers:
        for a, b in ((SILENT, FIRES), (FIRES, SILENT), (SILENT, FIRES)):  # each fires once
            net['a'](a), net['b'](b)
        assert layers.names() == []
        net['a'](SILENT), net['b'](FIRES)
        assert layers.names() == ['a']  # c never ran
        assert layers.names() == []
        net.eval()
        net['b'](SILENT)
        assert layers.names() == []
    assert not any(module._forward_hooks for module in net.modules())


def test_scaled_spikes_are_spikes():
    net = model()
    net['a'].register_forward_hook(lambda module, args, out: out * .25)
    with SilentLayers(net) as layers:
        net['a'](FIRES)
        assert layers.names() == []


class _Reads(TorchDispatchMode):
    """Counts the reads of a value from the device."""
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_step_reads_nothing_from_the_device():
    net = model()
    with SilentLayers(net) as layers, _Reads() as reads:
        net['a'](FIRES), net['a'](SILENT)
        assert reads.count == 0
        bool(FIRES.any())
        assert reads.count == 1  # it can count
    assert layers.names() == []


def _on_process(rank):
    net = model()
    with SilentLayers(net) as layers:
        net['a'](FIRES if rank else SILENT), net['b'](SILENT)
        return layers.names()


@pytest.mark.slow
def test_layer_that_fires_on_one_process_is_not_silent(tmp_path):
    assert run_processes(_on_process, 2, tmp_path) == [['b'], ['b']]


@pytest.mark.parametrize('threshold, silent', [('1000', True), ('0.5', False)])
def test_run_names_them_at_the_first_log_and_once(threshold, silent, tmp_path, monkeypatch, caplog):
    write_images(tmp_path / 'images')
    args = [*IMAGES, '--neuron-init', 'none', '--v-threshold', threshold]
    with caplog.at_level(logging.INFO):
        run_here(args, tmp_path, monkeypatch)
    text = 'Not one spike in training since the last log, at epoch 1, step 1: '
    messages = [record.getMessage() for record in caplog.records]
    found = [i for i, message in enumerate(messages) if 'layer4.0.act2' in message and text in message]
    assert len(found) == silent
    if silent:
        assert found[0] < next(i for i, message in enumerate(messages) if 'epoch 1/2 validation' in message)
        assert caplog.text.count('Not one spike') == 1
