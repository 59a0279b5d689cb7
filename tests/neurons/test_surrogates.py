"""Every surrogate: its values and its integral by the formula in float64, peers, and how one follows the training."""
import copy
import math
from functools import partial

import pytest
import timm
import torch
import torch.nn as nn

from timm_sscl import LIF, convert_to_spiking, list_surrogates, register_surrogate
from timm_sscl.neurons import lif_backend, spike
from timm_sscl.neurons.surrogate import resolve_surrogate
from timm_sscl.training.steps.compiling import CompileClock
from timm_sscl.training.steps.loop import begin_epoch

THRESHOLD = .5


def _normal(z, sigma):
    return math.exp(-z * z / (2 * sigma * sigma)) / math.sqrt(2 * math.pi) / sigma


def _sech2(z):
    return 1 / math.cosh(z) ** 2


# name, options: scalar formula of z = u - 0.5, integral, {z: value at the peak and at the ends}
CASES = {
    'rectangle': ((), lambda z: float(abs(z) <= .5), 1., {0: 1, -.5: 1, .5: 1, .5000001: 0, -.5000001: 0}),
    'rectangle_open': ((('width', .5),), lambda z: 2. * (abs(z) < .25), 1., {0: 2, .25: 0, -.25: 0, .2499999: 2}),
    'triangle': ((), lambda z: max(1 - abs(z), 0), 1., {0: 1, 1: 0, -1: 0, .25: .75}),
    'triangle_narrow': ((('gamma', .5),), lambda z: 4 * max(.5 - abs(z), 0), 1., {0: 2, .5: 0, -.25: 1}),
    'damped_triangle': ((), lambda z: .3 * max(1 - abs(z) / .5, 0) / .5, .3, {0: .6, .5: 0, -.5: 0, .25: .3}),
    'sigmoid': ((), lambda z: 1 / math.cosh(2 * z) ** 2, 1., {0: 1}),
    'sigmoid_steep': ((('alpha', 25.),), lambda z: 6.25 / math.cosh(12.5 * z) ** 2, 1., {0: 6.25}),
    'atan': ((), lambda z: 1 / (1 + (math.pi * z) ** 2), 1., {0: 1, 1 / math.pi: .5, -1 / math.pi: .5}),
    'fast_sigmoid': ((), lambda z: (1 + 25 * abs(z)) ** -2, 2 / 25, {0: 1, .04: .25, -.04: .25}),
    'superspike': ((), lambda z: (1 + abs(z)) ** -2, 2., {0: 1, 1: .25, -1: .25}),
    'erf': ((), lambda z: 2 / math.sqrt(math.pi) * math.exp(-4 * z * z), 1., {0: 1.1283791670955126}),
    'gaussian': ((), lambda z: .5 * _normal(z, .5), .5, {0: .3989422804014327}),
    'multi_gaussian': (
        (), lambda z: .5 * (1.15 * _normal(z, .5) - .15 * _normal(z - .5, 3) - .15 * _normal(z + .5, 3)), .425,
        {0: .43911}),
    'dspike': ((), lambda z: (abs(z) <= .5) * 3 * _sech2(3 * z) / (2 * math.tanh(1.5)), 1.,
               {0: 1.6572, .5: .2995, -.5: .2995, .5000001: 0, -.5000001: 0}),
}
HEAVY_TAILS = {'atan': 2 / math.pi ** 2, 'fast_sigmoid': 2 / 625, 'superspike': 2}  # c: what lies beyond r is c / r


def _of(case):
    options = CASES[case][0]
    return resolve_surrogate(case.removesuffix('_open').removesuffix('_narrow').removesuffix('_steep'), options)


def test_every_surrogate_has_a_case():
    named = {case.removesuffix('_open').removesuffix('_narrow').removesuffix('_steep') for case in CASES}
    assert named | {'evaf'} == set(list_surrogates())


@pytest.mark.parametrize('case', CASES)
def test_values_by_the_formula(case):
    h, (_, formula, _, values) = _of(case), CASES[case]
    z = torch.linspace(-2.51, 2.49, 401, dtype=torch.float64)
    expected = torch.tensor([formula(float(v)) for v in z], dtype=torch.float64)
    torch.testing.assert_close(h(z + THRESHOLD, THRESHOLD).double(), expected, rtol=1e-9, atol=1e-12)  # round-off
    for at, value in values.items():
        u = torch.tensor(at + THRESHOLD, dtype=torch.float64)
        digits = 5e-5 if case in ('dspike', 'multi_gaussian') else 1e-7  # four digits are known
        assert float(h(u, THRESHOLD)) == pytest.approx(value, abs=digits)


@pytest.mark.parametrize('case', CASES)
def test_integral(case):
    reach, n = 50., 400_000
    width = 2 * reach / n
    u = torch.linspace(-reach, reach, n + 1, dtype=torch.float64)[:-1] + width / 2 + THRESHOLD  # midpoints
    tail = next((c / reach for name, c in HEAVY_TAILS.items() if case == name), 0.)
    integral = float(_of(case)(u, THRESHOLD).double().sum()) * width + tail
    assert integral == pytest.approx(CASES[case][2], rel=2e-3)  # the tails' next order is 1 / reach^2 = 4e-4


@pytest.mark.parametrize('case', CASES)
def test_spike_has_this_gradient(case):
    h, z = _of(case), torch.linspace(-.8, .8, 33, dtype=torch.float64)
    u, threshold = (z + THRESHOLD).requires_grad_(), torch.tensor(THRESHOLD, dtype=torch.float64, requires_grad=True)
    spikes = spike(u, threshold, h)
    assert torch.equal(spikes, (u >= THRESHOLD).double())
    by_u, by_threshold = torch.autograd.grad(spikes.sum(), [u, threshold])
    assert torch.equal(by_u, h(u.detach(), THRESHOLD).double())
    torch.testing.assert_close(by_threshold, -by_u.sum())


# peers, where they are installed: library, maker of its surrogate from its module
SJ, SNNTORCH = 'spikingjelly.activation_based.surrogate', 'snntorch.surrogate'
PEERS = {
    'rectangle_open': (SJ, lambda sj: sj.Rect(alpha=2.)),
    'triangle_narrow': (SJ, lambda sj: sj.PiecewiseQuadratic(alpha=2.)),
    'sigmoid': (SJ, lambda sj: sj.Sigmoid(alpha=4.)), 'atan': (SJ, lambda sj: sj.ATan(alpha=2.)),
    'superspike': (SJ, lambda sj: sj.SuperSpike(alpha=1.)), 'erf': (SJ, lambda sj: sj.Erf(alpha=2.)),
    'sigmoid_steep': (SNNTORCH, lambda snntorch: snntorch.sigmoid(slope=25)),
    'fast_sigmoid': (SNNTORCH, lambda snntorch: snntorch.fast_sigmoid(slope=25))}


@pytest.mark.parametrize('case', PEERS)
def test_peers(case):
    library, make = PEERS[case]
    peer = make(pytest.importorskip(library))
    z = torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    theirs, = torch.autograd.grad(peer(z).sum(), z)
    torch.testing.assert_close(_of(case)(z.detach() + THRESHOLD, THRESHOLD).double(), theirs, rtol=1e-7, atol=1e-9)


# ---- the one that evolves

def _k(p, k_min=1., k_max=10.):
    return ((10 ** p - 1) * k_max + (10 - 10 ** p) * k_min) / 9


def test_evaf_from_its_start_to_its_end():
    z = torch.linspace(-3, 3, 61, dtype=torch.float64)
    evaf = resolve_surrogate('evaf', (('k_max', 8.),))
    for p in (0., .3, 1.):
        k = _k(p, k_max=8.)
        expected = torch.tensor([k / 2 * _sech2(k * float(v)) for v in z], dtype=torch.float64)
        ours = evaf(z + THRESHOLD, THRESHOLD, progress=torch.tensor(p, dtype=torch.float64))
        torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-12)  # 1 - tanh^2 far from the threshold
    assert (_k(0), _k(1)) == (1, 10)
    u = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    for p in (0., 1.):
        h = resolve_surrogate('evaf')(u, THRESHOLD, progress=torch.tensor(p, dtype=torch.float64))
        assert float(h.sum()) * 1e-3 == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize('mode', ['eager', 'compiled'])
def test_neuron_follows_the_progress(mode):
    neuron, x = LIF(1, surrogate='evaf').double(), torch.randn(6, dtype=torch.float64, requires_grad=True)
    with lif_backend(mode):
        for p in (0., .5, 1.):
            neuron.set_progress(p)
            grad, = torch.autograd.grad(neuron(x).sum(), x)
            k = _k(p)
            torch.testing.assert_close(grad, k / 2 / torch.cosh(k * (x.detach() - .5)) ** 2, rtol=1e-9, atol=1e-12)


def _net(**options):
    torch.manual_seed(0)
    return convert_to_spiking(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), example_inputs=torch.zeros(1, 4), **options)


def test_progress_of_a_model():
    model = _net(surrogate='evaf', surrogate_kwargs=dict(k_max=5.))
    keys = list(model.state_dict())
    model.set_progress(.25)
    assert model[1].progress.item() == .25 and copy.deepcopy(model)[1].progress.item() == .25
    assert list(model.state_dict()) == keys and not any('progress' in key for key in keys)
    for bad in (-.1, 1.1):
        with pytest.raises(ValueError, match=f'progress={bad}'):
            model.set_progress(bad)
    plain = _net()
    plain.set_progress(.5)  # nothing to tell
    assert not any('progress' in name for name, _ in plain.named_buffers())
    plain[1].configure(4, surrogate='evaf')
    plain.set_progress(.5)
    assert plain[1].progress.item() == .5
    with pytest.raises(ValueError, match="'progress' is set by the training; its options are k_min, k_max"):
        LIF(2, surrogate='evaf', surrogate_kwargs=dict(progress=1.))


def test_training_tells_the_progress():
    class Stub:
        def __init__(self, module):
            self.module, self.task, self.epochs, self.train_loader, self.dataset = module, module, 8, [0], None
            self.mixup, self.position = None, type('Position', (), dict(epoch=0, step=0))
            self.args = type('Args', (), dict(mixup_off_epoch=0))
            self.accelerator = type('Accelerator', (), dict(is_main_process=False))
            self.compiling = CompileClock()

    model = _net(surrogate='evaf')
    seen = []
    for epoch in (0, 2, 7):
        begin_epoch(Stub(model), epoch)
        seen.append(model[1].progress.item())
    assert seen == [0, .25, .875]


def test_a_users_surrogate_may_follow_the_progress():
    @register_surrogate('mine')
    def mine(u, v_threshold, height=1., *, progress):
        return height * (1 + progress) * torch.ones_like(u)

    neuron, x = LIF(1, surrogate='mine', surrogate_kwargs=dict(height=2.)), torch.randn(5, requires_grad=True)
    neuron.set_progress(.5)
    grad, = torch.autograd.grad(neuron(x).sum(), x)
    assert torch.equal(grad, torch.full_like(x, 3.))


def test_open_rectangle_in_a_model():
    model = timm.create_model('spiking_test_resnet', num_classes=3, surrogate='rectangle',
                              surrogate_kwargs=dict(width=.5))
    h = partial(next(iter(model.neurons().values())).settings.surrogate_function)
    assert h(torch.tensor([.3, .7]), .5).tolist() == [2., 2.] and h(torch.tensor([.2]), .5).item() == 0
