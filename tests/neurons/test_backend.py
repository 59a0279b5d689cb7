"""The compiled neuron against the eager one, and what happens without a compiler."""
import gc
import os
import subprocess
import sys
import weakref
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn as nn

from timm_sscl import LIF, lif
from timm_sscl.neurons import lif_backend, packed_spikes

ROOT = Path(__file__).resolve().parents[2]

# settings, and per-channel or scalar gain: each is other code for the compiler
SETTINGS = [dict(), dict(tau=.6, v_threshold=.7, v_reset=-.2), dict(v_reset=None),
            dict(tau=1., v_threshold=1., v_reset=None, v_init=.5)]


def _data(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x.masked_fill(torch.rand(shape, generator=generator) < .2, 0.).to(dtype)  # exact zeros too


def _run(backend, x, grad, **settings):
    with lif_backend(backend):
        x = x.detach().requires_grad_()
        spikes = lif(x, **settings)
        return spikes.detach(), torch.autograd.grad(spikes, x, grad)[0]


def _assert_same(first, second, dtype):
    assert torch.equal(first[0], second[0])
    # the same operations in the same order, but inductor may contract or reorder a sum's two roundings
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(first[1], second[1], rtol=tolerance, atol=tolerance)


# every combination compiles for seconds: settings in float64, the other dtypes and numbers of steps with the default
@pytest.mark.parametrize('settings, dtype, timesteps', [
    *((settings, torch.float64, 3) for settings in SETTINGS), (dict(), torch.float32, 1), (dict(), torch.bfloat16, 4),
    (dict(detach_reset=True), torch.float64, 9)], ids=str)  # nine steps are two bytes of bits
def test_compiled_equals_eager(settings, dtype, timesteps):
    x, grad = _data((timesteps, 2, 501), dtype), _data((timesteps, 2, 501), dtype, seed=1)
    _assert_same(_run('compiled', x, grad, **settings), _run('eager', x, grad, **settings), dtype)


@pytest.mark.parametrize('layout', ['contiguous', 'channels_last', 'sliced', 'repeated'])
@pytest.mark.parametrize('gain, backends', [
    (None, ['eager']), (torch.tensor(1.7), ['eager']),
    (torch.tensor([.5, 1., 2.]).view(3, 1, 1), ['eager', 'compiled'])], ids=['1', '0-d', 'C'])
def test_memory_formats_and_gains(gain, backends, layout):
    x, grad = _data((4, 2, 3, 5, 6), torch.float64), _data((4, 2, 3, 5, 6), torch.float64, seed=1)
    if layout == 'channels_last':
        x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).view(4, 2, 3, 5, 6)
    elif layout == 'sliced':
        x = _data((4, 2, 3, 5, 12), torch.float64)[..., ::2]
    elif layout == 'repeated':
        x = x[:1].expand(4, -1, -1, -1, -1)
    reference = _run('eager', (x if gain is None else x * gain).contiguous(), grad)
    for backend in backends:
        spikes, grad_x = _run(backend, x, grad, gain=gain)
        assert torch.equal(spikes, reference[0])
        assert spikes.stride() == x.stride() or layout in ('sliced', 'repeated')
        expected = reference[1] if gain is None else reference[1] * gain
        torch.testing.assert_close(grad_x, expected, rtol=1e-14, atol=1e-14)


def test_another_batch_is_no_other_graph():
    with lif_backend('compiled'):
        lif(torch.randn(3, 40))
        with torch.compiler.set_stance('fail_on_recompile'):
            for batch in (2, 41, 1000):
                x = torch.randn(3, batch)
                spikes = lif(x)
                with lif_backend('eager'):
                    assert torch.equal(spikes, lif(x))


def test_graphs_do_not_run_out(monkeypatch, caplog):
    """Dynamo stops at eight graphs per function; more layouts, dtypes and numbers of steps than that all compile."""
    calls, torch_compile = [], torch.compile

    def compile_without_inductor(function, options, **kwargs):  # it is dynamo that stops
        calls.append(1)
        return torch_compile(function, backend='eager', **kwargs)
    monkeypatch.setattr(torch, 'compile', compile_without_inductor)
    neuron = partial(lif, tau=.2371)  # of no other test: nothing is compiled for it yet
    with lif_backend('compiled'), torch.compiler.set_stance('default'):
        for timesteps in (1, 2):
            for shape in ((timesteps, 1), (timesteps, 3, 2)):
                for dtype in (torch.float32, torch.float64, torch.bfloat16):
                    x = _data(shape, dtype)
                    with lif_backend('eager'):
                        expected = neuron(x)
                    assert torch.equal(neuron(x), expected)
    assert len(calls) == 12 and 'without torch.compile' not in caplog.text


NO_COMPILER = '''
import logging, sys, torch, timm_sscl
logging.basicConfig(level=logging.INFO)
from timm_sscl.neurons import lif, lif_backend
assert 'torch._inductor.compile_fx' not in sys.modules  # importing compiles nothing
x = torch.randn(4, 2 ** 17, requires_grad=True)  # large enough to be worth compiling
spikes = lif(x)
lif(x).sum().backward()
with lif_backend('eager'):
    assert torch.equal(spikes, lif(x))
print('done')
'''


@pytest.mark.slow
def test_importing_compiles_nothing_and_without_a_compiler_one_line_is_logged(tmp_path):
    env = {**os.environ, 'CXX': 'no-such-compiler', 'TORCHINDUCTOR_CACHE_DIR': str(tmp_path), 'PYTHONPATH': str(ROOT)}
    result = subprocess.run([sys.executable, '-c', NO_COMPILER], capture_output=True, text=True, env=env, timeout=300)
    assert 'done' in result.stdout, result.stderr
    assert result.stderr.count('run without torch.compile') == 1


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend 'fast': must be one of auto, compiled, eager"):
        with lif_backend('fast'):
            pass


# ------------------------------------------------------------------------------------------- what is kept for backward

def _layers(dtype, norm, gain=None, **settings):
    torch.manual_seed(0)
    bn, act, conv = nn.BatchNorm2d(6, affine=norm != 'plain'), LIF(3, **settings), nn.Conv2d(6, 5, 3)
    act.set_gain(gain)
    if norm != 'plain':
        nn.init.normal_(bn.weight)
        nn.init.normal_(bn.bias)
    return nn.ModuleList([bn, act, conv]).to(dtype)


def _gradients(layers, x, cut=False, context=nullcontext):
    """Gradients by x and all parameters; cut hides from the neuron that its input comes from the norm."""
    bn, act, conv = layers
    x = x.detach().requires_grad_()
    with context():
        current = bn(x)
        out = conv(act(current * 1 if cut else current))
    return torch.autograd.grad(out.square().sum(), [x, *layers.parameters()])


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('norm', ['affine', 'plain'])
@pytest.mark.parametrize('settings', [dict(), dict(v_reset=None), dict(detach_reset=True), dict(v_reset=-.2, tau=.6)],
                         ids=str)
def test_behind_a_batch_norm_gradients_are_the_same(settings, norm, memory_format):
    for gain in (None, torch.tensor(1.3), torch.rand(6, 1, 1) + .5):
        layers = _layers(torch.float64, norm, gain, **settings)
        x = _data((12, 6, 5, 5), torch.float64).contiguous(memory_format=memory_format)
        expected = _gradients(layers, x, cut=True)
        for context in (nullcontext, packed_spikes):
            _assert_same_gradients(_gradients(layers, x, context=context), expected)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_behind_a_batch_norm_compiled(memory_format):
    layers = _layers(torch.float64, 'affine', torch.tensor(1.3))
    x = _data((12, 6, 5, 5), torch.float64).contiguous(memory_format=memory_format)
    with lif_backend('compiled'):
        got = _gradients(layers, x, context=packed_spikes)
    _assert_same_gradients(got, _gradients(layers, x, cut=True))


def _assert_same_gradients(got, expected):
    for a, b in zip(got, expected):
        # the current is made again as scale * x + shift: other roundings, in a smooth term only
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12 * b.abs().max().item())


def _kept(layers, x, context=nullcontext):
    """Bytes that autograd keeps for the backward of norm, neuron and convolution, parameters and inputs aside."""
    seen = {}
    bn, act, conv = layers
    known = {t.untyped_storage().data_ptr() for t in [x, *layers.parameters(), *layers.buffers()]}

    def keep(t):
        if t.untyped_storage().data_ptr() not in known:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(), t  # held: no address twice
        return t

    with context():
        current = bn(x)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = act(current)
        del current
    return sum(n for n, _ in seen.values()), out


@pytest.mark.parametrize('settings, expected', [
    (dict(), 4.), (dict(detach_reset=True), 2 / 3), (dict(v_reset=None), 2 / 3)], ids=str)
def test_neuron_keeps_its_input_or_two_bits(settings, expected):
    """float32: one copy of the current where the potentials are needed; else a byte per three steps, twice."""
    layers = _layers(torch.float32, 'affine', **settings)
    x = torch.randn(12, 6, 5, 5)
    assert _kept(layers, x)[0] == expected * x.numel()


def test_neuron_behind_a_norm_lets_go_of_its_input():
    bn, act, conv = _layers(torch.float32, 'affine')
    x = torch.randn(12, 6, 5, 5, requires_grad=True)
    current = bn(x)
    import weakref
    alive = weakref.ref(current)
    out = act(current)
    del current
    assert alive() is None
    out.sum().backward()
    assert x.grad.isfinite().all()


def test_bias_changed_before_the_backward_is_an_error():
    bn, act, _ = _layers(torch.float32, 'affine')
    out = act(bn(torch.randn(12, 6, 5, 5, requires_grad=True)))
    with torch.no_grad():
        bn.bias.add_(1.)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        out.sum().backward()


def test_checkpointing_around_norm_and_neuron():
    layers = _layers(torch.float64, 'affine')
    x = _data((12, 6, 5, 5), torch.float64)
    expected = _gradients(layers, x, cut=True)
    x = x.requires_grad_()
    out = torch.utils.checkpoint.checkpoint(lambda x: layers[2](layers[1](layers[0](x))), x, use_reentrant=False)
    got = torch.autograd.grad(out.square().sum(), [x, *layers.parameters()])
    _assert_same_gradients(got, expected)


# ------------------------------------------------------------------------------------------------------ packed spikes

def _saved_by_conv(view):
    """Forward and gradients of a layer on a view of spikes, packed or not."""
    torch.manual_seed(0)
    act, linear = LIF(3), nn.Linear(8, 4)
    x = _data((6, 5, 8), torch.float32)
    results = []
    for context in (nullcontext, packed_spikes):
        current = x.clone().requires_grad_()
        with context():
            out = linear(view(act(current)))
        results.append(torch.autograd.grad(out.square().sum(), [current, linear.weight]))
    return results


@pytest.mark.parametrize('view', [
    lambda s: s, lambda s: s[:, 1:], lambda s: s.transpose(0, 1), lambda s: s.flatten(0, 1)[::2], lambda s: s * .5,
    lambda s: s.mul_(.5)], ids=['whole', 'slice', 'transposed', 'strided', 'other values', 'written to'])
def test_packed_spikes_change_no_gradient(view):
    plain, packed = _saved_by_conv(view)
    assert all(torch.equal(a, b) for a, b in zip(plain, packed))


def test_packed_spikes_are_bits():
    act, conv, alive = LIF(8), nn.Conv2d(6, 5, 3), []
    for context in (nullcontext, packed_spikes):
        with context():
            spikes = act(torch.randn(16, 6, 5, 5, requires_grad=True))
            out, expected, reference = conv(spikes), spikes.clone(), weakref.ref(spikes)
        del spikes
        gc.collect()
        alive.append(reference() is not None)  # the floats are kept by the convolution's graph
        assert torch.equal(out.grad_fn._saved_input, expected) and expected.any()
    assert alive == [True, False]


def test_inplace_change_of_what_is_kept_is_an_error_inside_too():
    x = torch.randn(4, 3, requires_grad=True)
    with packed_spikes():
        y = x * 2
        z = y * y
    y.add_(1)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        z.sum().backward()


def test_somebody_elses_hooks_stay():
    act, linear = LIF(3), nn.Linear(8, 4)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
        with packed_spikes():
            linear(act(torch.randn(6, 8, requires_grad=True)))
    assert torch.Size([6, 8]) in packed
