"""Each neuron against its equations: by hand, step by step in float64 with gradients, and against other libraries."""
import math

import pytest
import torch

from timm_sscl.neurons import create_neuron, lif_backend

DOUBLE = dict(dtype=torch.float64)


@pytest.fixture(autouse=True)
def _eager():
    with lif_backend('eager'):
        yield


def _make(name, timesteps, shape=(1,), **settings):
    torch.manual_seed(0)
    return create_neuron(name, timesteps, channels=shape, **settings).double()


def _set(neuron, **parameters):
    with torch.no_grad():
        for name, value in parameters.items():
            neuron._parameters[name].copy_(torch.as_tensor(value))
    return neuron


def _fires(neuron, currents):
    """Output for currents of one neuron, one per step."""
    return neuron(torch.tensor(currents, **DOUBLE).view(-1, 1)).flatten().tolist()


# ---- by hand

SHUT = dict(gate_leak=-1e4, gate_input=-1e4, gate_reset=-1e4)
_TAU_1 = 1 / math.log(2)  # decays to a half
HAND = {
    'if': (dict(v_reset=None), {}, [7 / 16] * 8, [0, 0, 1, 0, 1, 0, 1, 0]),
    'if_halved': (dict(v_reset=None, v_init=.5), {}, [7 / 16] * 8, [0, 1, 0, 1, 0, 1, 0, 1]),
    'lif': (dict(tau=.25, v_threshold=.5), {}, [.4] * 3, [0, 1, 0]),  # 0.4 + 0.1 is the threshold: fires
    'plif': (dict(), {}, [1.9, 1.9, .1, 2.], [0, 1, 0, 1]),  # u = .95, 1.425, .05, 1.025
    'glif': (dict(), SHUT, [.5] * 4, [0, 1, 1, 1]),  # u = .4375, .875, .8125, .75
    'klif': (dict(), dict(k=1.), [1.] * 8, [0] * 8),
    'klif_steep': (dict(), dict(k=2.), [1.] * 4, [1] * 4),
    'ltmd': (dict(), {}, [.45, .45, .3], [0, 1, 0]),  # V = .4621; u = .45, .5625, .3
    'diet': (dict(), {}, [.625] * 5, [0, 1, 0, 1, 1]),
    'alif': (dict(tau=.5, rho=.5, v_threshold=1., beta=1.), {}, [5.] * 4, [1, 1, 1, 0]),
    'multi_gaussian_alif': (dict(tau_m=_TAU_1, tau_m_std=0., tau_a=_TAU_1, tau_a_std=0., v_threshold=1., beta=1.), {},
                            [5.] * 4, [1, 1, 0, 1]),  # b0 = 1: A = 1.5, 1.75, 1.875, 1.4375; u = 2.5, 2, 1.625, 3.3125
    'liaf': (dict(), {}, [.8] * 3, [0, .2, 0]),
    'ternary': (dict(), {}, [.3, .3, -.9], [0, 0, -1]),
    'real_spike': (dict(), dict(amplitude=[.5]), [.6, .6, .6], [0, .5, 0]),
    'mlf': (dict(), {}, [2.] * 4, [2, 2, 3, 2]),
    'psn': (dict(), dict(step_weight=torch.eye(3), step_bias=torch.full((3, 1), -.5)), [.4, .5, .6], [0, 1, 1]),
    'masked_psn': (dict(k=1), dict(step_weight=torch.ones(3, 3), step_bias=torch.full((3, 1), -.5)), [.4, .5, .6],
                   [0, 1, 1]),
    'sliding_psn': (dict(k=2), {}, [.9, .5, .6, 2.], [0, 0, 0, 1]),  # .9, .95, .85, 2.3 against 1
    'ilif': (dict(), {}, [2.75, 2.75, 5., .5], [3, 3, 4, 1]),
}
NAMES = sorted({case.removesuffix('_halved').removesuffix('_steep') for case in HAND})


@pytest.mark.parametrize('case', HAND)
def test_by_hand(case):
    settings, parameters, currents, expected = HAND[case]
    neuron = _set(_make(case.removesuffix('_halved').removesuffix('_steep'), len(currents), **settings), **parameters)
    assert _fires(neuron, currents) == pytest.approx(expected, abs=1e-7)  # parameters that were float32


def _by(neuron, current, *parameters):
    x = torch.full((neuron.timesteps, 1), current, **DOUBLE).requires_grad_()
    return [g.sum().item() for g in torch.autograd.grad(neuron(x).sum(), [x, *parameters])]


def test_gradients_by_hand():
    plif = _make('plif', 1)  # u = sigmoid(0) * 2 = 1, on the threshold: dS/dw = 1 * x * sigmoid'(0)
    assert _by(plif, 2., plif.w)[1] == pytest.approx(.5)
    ltmd = _make('ltmd', 1)
    assert _by(ltmd, .5, ltmd.w) == pytest.approx([1, -.7864], abs=5e-5)
    diet = _make('diet', 1)
    assert _by(diet, 1.25, diet.v_threshold) == pytest.approx([.225, -.28125])
    ternary = _make('ternary', 1, learn_amplitude=False)
    assert [_by(ternary, x)[0] for x in (-1.01, -1., 0., .7, 1., 1.01)] == [0, 1, 1, 1, 1, 0]
    ilif = _make('ilif', 1)
    assert [_by(ilif, x)[0] for x in (-.01, 0., 2.2, 4., 4.01)] == [0, 1, 1, 1, 0]
    real = _set(_make('real_spike', 1), amplitude=[3.])
    assert _by(real, 1., real.amplitude) == pytest.approx([3., 1.])  # atan's peak is 1


def test_initial_values():
    assert _make('plif', 2, tau=.75).w.sigmoid().item() == pytest.approx(.25)
    glif = _make('glif', 4, (6, 1, 1))
    start = dict(gate_leak=.55, gate_input=.65, gate_reset=.55, decay=.25, v_threshold=.5, leak=.0625, v_reset=.5)
    for name, value in start.items():
        parameter = glif._parameters[name]
        assert parameter.shape == (6, 1, 1) and torch.allclose(parameter.sigmoid(), torch.tensor(value, **DOUBLE))
    assert glif.input_weight.shape == (4, 6, 1, 1) and (glif.input_weight.sigmoid() == .5).all()
    assert _make('glif', 4, (6, 1, 1), per_channel=False).decay.shape == ()
    yin = _make('multi_gaussian_alif', 2, (4000,))
    for w, mean in ((yin.w_m, 20), (yin.w_a, 200)):
        tau = -1 / torch.log(w.sigmoid())
        assert abs(tau.mean().item() - mean) < .4 and abs(tau.std().item() - 5) < .3  # 5 deviations of 4000 draws
    psn = _make('psn', 4)
    assert (psn.step_bias == -1).all() and psn.step_weight.abs().max() <= .5 < 2 * psn.step_weight.abs().max()
    assert _make('sliding_psn', 4, k=3).filter.tolist() == [.25, .5, 1]
    assert _make('ltmd', 2).w.item() == pytest.approx(.5)


def test_real_spike_folds_into_the_convolution():
    neuron = _make('real_spike', 2, (3, 1, 1))
    _set(neuron, amplitude=torch.tensor([.5, 2., 3.]).view(3, 1, 1))
    x, weight = torch.randn(4, 3, 5, 5, **DOUBLE) + 1, torch.randn(2, 3, 3, 3, **DOUBLE)
    out = neuron(x)
    spikes = neuron.levels(out)
    assert spikes.unique().tolist() == [0, 1]
    folded = torch.nn.functional.conv2d(spikes, weight * neuron.amplitude.view(1, 3, 1, 1))
    torch.testing.assert_close(torch.nn.functional.conv2d(out, weight), folded)


# ---- step by step, in plain autograd

class _Spike(torch.autograd.Function):
    """Heaviside of z with a given derivative."""

    @staticmethod
    def forward(ctx, z, h):
        ctx.save_for_backward(h)
        return (z >= 0).to(z.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None


def _fire(u, v_threshold, h):
    z = u - v_threshold
    return _Spike.apply(z, h(z.detach()))


def _rectangle(z):
    return (z.abs() < .5).double()


def _atan(z):
    return 1 / (1 + (math.pi * z) ** 2)


def _damped(z):
    return .3 * (1 - z.abs()).clamp(min=0)


def _sigmoid(z):
    return 4 * torch.sigmoid(4 * z) * (1 - torch.sigmoid(4 * z))


def _closed(threshold):
    return lambda z: ((z >= -threshold) & (z <= threshold)).double()


def _plif(x, p):
    v, out = torch.zeros_like(x[0]), []
    for current in x:
        v = v + torch.sigmoid(p['w']) * (current - v)
        s = _fire(v, 1., _atan)
        v = v * (1 - s.detach())
        out.append(s)
    return out


def _gate(w):
    g = torch.sigmoid(w)
    return g + ((g >= .5).double() - g).detach()


def _glif(x, p, soft=False):
    gate = torch.sigmoid if soft else _gate
    a, b, c = gate(p['gate_leak']), gate(p['gate_input']), gate(p['gate_reset'])
    d, v_threshold, leak, r = (torch.sigmoid(p[k]) for k in ('decay', 'v_threshold', 'leak', 'v_reset'))
    u = s = torch.zeros_like(x[0])
    out = []
    for t, current in enumerate(x):
        current = current * (1 - b * (1 - torch.sigmoid(p['input_weight'][t])))
        u = (1 - a * (1 - d)) * u * (1 - c * s) - (1 - a) * leak + current - (1 - c) * r * s
        s = _fire(u, v_threshold, _rectangle)
        out.append(s)
    return out


def _klif(x, p, scale=False):
    v, out = torch.zeros_like(x[0]), []
    for current in x:
        f = torch.relu(p['k'] * (v + (current - v) / 2))
        s = _fire(f, 1., _sigmoid)
        v = f * (1 - s) / (p['k'] if scale else 1)
        out.append(s)
    return out


def _ltmd(x, p):
    v, out = torch.zeros_like(x[0]), []
    for current in x:
        u = .25 * v + current
        s = _fire(u, torch.tanh(p['w']), _rectangle)
        v = u * (1 - s)
        out.append(s)
    return out


def _diet(x, p):
    v, out = torch.zeros_like(x[0]), []
    for current in x:
        u = (p['leak'] - (p['leak'] - 1).clamp(min=0).detach()) * v + current  # at most 1
        s = _fire(u / p['v_threshold'], 1., _damped)
        v = u - p['v_threshold'] * s.detach()
        out.append(s)
    return out


def _alif(x, p):
    u = b = s = torch.zeros_like(x[0])
    alpha, rho, out = math.exp(-1 / 20), math.exp(-1 / 200), []
    for current in x:
        b = rho * b + (1 - rho) * s
        a = .01 + 1.6 * b
        u = alpha * u + (1 - alpha) * current - a * s
        s = _fire((u - a) / a, 0., _damped)
        out.append(s)
    return out


def _normal(z, sigma, mean=0.):
    return torch.exp(-(z - mean) ** 2 / (2 * sigma ** 2)) / math.sqrt(2 * math.pi) / sigma


def _multi_gaussian(z):
    return .5 * (1.15 * _normal(z, .5) - .15 * (_normal(z, 3., .5) + _normal(z, 3., -.5)))


def _yin(x, p):
    u, b, s = torch.zeros_like(x[0]), torch.full_like(x[0], .01), torch.zeros_like(x[0])
    alpha, rho, out = torch.sigmoid(p['w_m']), torch.sigmoid(p['w_a']), []
    for current in x:
        b = rho * b + (1 - rho) * s
        a = .01 + 1.8 * b
        u = alpha * u + (1 - alpha) * current - a * s
        s = _fire(u, a, _multi_gaussian)
        out.append(s)
    return out


def _liaf(x, p):
    v, out = torch.zeros_like(x[0]), []
    for current in x:
        u = .5 * v + current
        s = _fire(u, 1., _closed(1.))
        v = u * (1 - s)
        out.append(torch.relu(u - 1))
    return out


class _TernarySpike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return torch.sign(u) * (u.abs() >= .5)

    @staticmethod
    def backward(ctx, grad):
        return grad * (ctx.saved_tensors[0].abs() <= 1)


def _ternary(x, p):
    v, out = torch.zeros_like(x[0]), []
    for current in x:
        u = .25 * v + current
        s = _TernarySpike.apply(u)
        v = u * (1 - s.abs())
        out.append(p['amplitude'] * s)
    return out


def _real_spike(x, p):
    v, out = torch.zeros_like(x[0]), []
    for current in x:
        u = v + current
        s = _fire(u, 1., _atan)
        v = u * (1 - s.detach())
        out.append(p['amplitude'] * s)
    return out


def _mlf(x, p):
    v, out = [torch.zeros_like(x[0])] * 3, []
    for current in x:
        u = [.25 * v_k + current for v_k in v]
        s = [_fire(u_k, .6 + k, _rectangle) for k, u_k in enumerate(u)]
        v = [u_k * (1 - s_k) for u_k, s_k in zip(u, s)]
        out.append(sum(s))
    return out


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return torch.round(torch.clamp(u, 0, 4))

    @staticmethod
    def backward(ctx, grad):
        u, = ctx.saved_tensors
        return grad * ((u >= 0) & (u <= 4))


def _ilif(x, p):
    v, out = torch.zeros_like(x[0]), []
    for current in x:
        u = .25 * v + current
        out.append(_Round.apply(u))
        v = u - out[-1].detach()
    return out


def _psn(x, p, visible=lambda t, j: True):
    T = len(x)
    return [_fire(sum(p['step_weight'][t, j] * x[j] for j in range(T) if visible(t, j)) + p['step_bias'][t, 0], 0.,
                  _atan) for t in range(T)]


def _sliding(x, p):
    return [_fire(p['filter'][1] * x[t] + (p['filter'][0] * x[t - 1] if t else 0.) + p['filter_bias'], 0., _atan)
            for t in range(len(x))]


def _if(x, p):
    v, out = torch.zeros_like(x[0]), []
    for current in x:
        u = v + current
        s = _fire(u, 1., _closed(1.))
        v = u * (1 - s)
        out.append(s)
    return out


REFERENCES = {
    'if': (_if, {}), 'plif': (_plif, {}), 'glif': (_glif, {}),
    'glif_soft': (lambda x, p: _glif(x, p, soft=True), dict(soft_gates=True)),
    'klif': (_klif, {}), 'klif_scaled': (lambda x, p: _klif(x, p, scale=True), dict(scale_reset=True)),
    'ltmd': (_ltmd, {}), 'diet': (_diet, {}), 'alif': (_alif, {}), 'multi_gaussian_alif': (_yin, {}),
    'liaf': (_liaf, {}), 'ternary': (_ternary, {}), 'real_spike': (_real_spike, {}), 'mlf': (_mlf, {}),
    'ilif': (_ilif, {}), 'psn': (_psn, {}),
    'masked_psn': (lambda x, p: _psn(x, p, lambda t, j: t - 2 < j <= t), {}), 'sliding_psn': (_sliding, {})}


def test_every_neuron_has_a_reference():
    assert {case.removesuffix('_soft').removesuffix('_scaled') for case in REFERENCES} | {'lif'} == set(NAMES)


@pytest.mark.parametrize('case', REFERENCES)
def test_step_by_step(case):
    reference, settings = REFERENCES[case]
    T, C = 5, 6
    neuron = _make(case.removesuffix('_soft').removesuffix('_scaled'), T, (C, 1), **settings)
    with torch.no_grad():
        for p in neuron.parameters():
            p.add_(.3 * torch.randn(p.shape, **DOUBLE))
    generator = torch.Generator().manual_seed(1)
    x = 2 * torch.randn(T, 7, C, 3, generator=generator, **DOUBLE)
    x = (x * max(neuron.threshold(), .2)).requires_grad_()
    weight = torch.randn(x.shape, generator=generator, **DOUBLE)
    parameters = dict(neuron.named_parameters())
    ours, theirs = neuron(x.flatten(0, 1)).view_as(x), torch.stack(reference(x, parameters))
    torch.testing.assert_close(ours, theirs)
    assert len(ours.detach().unique()) > 1
    inputs = [x, *parameters.values()]
    for a, b, name in zip(*(torch.autograd.grad((out * weight).sum(), inputs) for out in (ours, theirs)),
                          ['x', *parameters]):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m: f'{name}: {m}')


# ---- another library, where it is installed

try:
    from spikingjelly.activation_based import neuron as sj
    from spikingjelly.activation_based import surrogate as sj_surrogate
except ImportError:
    sj = None


def _steps_of(module, x):
    """Step by step: the multi-step mode of their LIAF returns spikes."""
    if isinstance(module, (sj.PSN, sj.MaskedPSN, sj.SlidingPSN)):
        module.step_mode = 'm'
        return module.double()(x)
    module = module.double()
    return torch.stack([module(current) for current in x])


PEERS = {
    'if': (lambda: sj.IFNode(surrogate_function=sj_surrogate.Sigmoid()), dict(surrogate='sigmoid')),
    'if_soft': (lambda: sj.IFNode(v_reset=None, surrogate_function=sj_surrogate.Sigmoid()),
                dict(surrogate='sigmoid', v_reset=None)),
    'lif': (lambda: sj.LIFNode(tau=4 / 3, decay_input=False, v_threshold=.5, surrogate_function=sj_surrogate.Sigmoid()),
            dict(surrogate='sigmoid')),
    'plif': (lambda: sj.ParametricLIFNode(init_tau=2., detach_reset=True, surrogate_function=sj_surrogate.ATan()), {}),
    'klif': (lambda: sj.KLIFNode(surrogate_function=sj_surrogate.Sigmoid()), {}),
    'klif_scaled': (lambda: sj.KLIFNode(scale_reset=True, surrogate_function=sj_surrogate.Sigmoid()),
                    dict(scale_reset=True)),
    'liaf': (lambda: sj.LIAFNode(act=torch.relu, threshold_related=True, tau=2., decay_input=False,
                                 surrogate_function=sj_surrogate.Sigmoid()), dict(surrogate='sigmoid')),
    'sliding_psn': (lambda: sj.SlidingPSN(k=3, surrogate_function=sj_surrogate.ATan()), dict(k=3)),
    'psn': (lambda: sj.PSN(T=4, surrogate_function=sj_surrogate.ATan()), {}),
    'masked_psn': (lambda: sj.MaskedPSN(k=2, T=4, lambda_init=1., surrogate_function=sj_surrogate.ATan()), dict(k=2)),
    'masked_psn_half': (lambda: sj.MaskedPSN(k=2, T=4, lambda_init=.5, surrogate_function=sj_surrogate.ATan()),
                        dict(k=2, mask=.5)),
}


@pytest.mark.skipif(sj is None, reason='needs SpikingJelly')
@pytest.mark.parametrize('case', PEERS)
def test_spikingjelly(case):
    make, settings = PEERS[case]
    theirs = make()
    name = next(name for name in sorted(NAMES, key=len, reverse=True) if case.startswith(name))
    ours = _make(name, 4, **settings)
    if name.endswith('psn'):
        names = ('filter', 'filter_bias') if name == 'sliding_psn' else ('step_weight', 'step_bias')
        _set(ours, **dict(zip(names, (theirs.weight.detach(), theirs.bias.detach()))))
    x = (2 * torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0), **DOUBLE)).requires_grad_()
    out, expected = ours(x.flatten(0, 1)).view_as(x), _steps_of(theirs, x)
    assert torch.equal(out, expected) or torch.allclose(out, expected, atol=1e-12)
    assert out.detach().unique().numel() > 1
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), **DOUBLE)
    for a, b in zip(*(torch.autograd.grad((o * weight).sum(), x) for o in (out, expected))):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)  # their constants are float32
