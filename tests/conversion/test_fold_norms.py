"""fold_norms: every norm into weights, per-step gains, maps per timestep or thresholds, or a reason; outputs stay."""
import copy
import pickle

import pytest
import timm
import torch
import torch.nn as nn

from timm_sscl import calibrate, convert_to_spiking, fold_gains, fold_norms, register_variant, share_stem
from timm_sscl.conversion import BatchNormOverTime, BatchNormVariant

T, K = 3, 4
# float64: scale and shift are rounded once more, and products are summed in another order
ROUND_OFF = dict(rtol=1e-9, atol=1e-9)
NORMS = [None, 'tdbn', 'tebn', 'bntt', 'tab', 'mpbn']


class _Net(nn.Module):
    """conv-norm-neuron, a residual sum, a neuron before a norm, linear-norm, and a norm whose output is analog."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.act1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.bn2, self.act2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.bn3, self.conv3, self.bn4 = nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6)
        self.fc, self.bn5, self.act5, self.head = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, K)

    def forward(self, x):
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.bn2(self.conv2(x)) + x)
        x = self.bn4(self.conv3(self.bn3(x))).mean((2, 3))
        return self.head(x) + self.head(self.act5(self.bn5(self.fc(x))))


def _images():
    return torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _trained(model, x, steps=80):
    """Values that differ between channels and timesteps, and statistics that were followed for some steps."""
    calibrate(model, x)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if 'bn' in name or 'norm' in name:
                p.add_(.4 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        model.train()
        for _ in range(steps):  # .9 ** 80 of the first running variance, 1, is left
            model(x + .1 * torch.randn(x.shape, generator=generator, dtype=x.dtype))
    return model.eval()


def _net(norm, **options):
    torch.manual_seed(0)
    if norm == 'mpbn':
        options.setdefault('surrogate', 'triangle')
    return _trained(convert_to_spiking(_Net(), timesteps=T, norm=norm, **options).double(), _images())


def _folds(model):
    return {fold.name: fold for fold in model.spiking_report().folds}


@torch.no_grad()
def _assert_equal_over_time(model, twin, x):
    for timesteps in (T, 1, 2, T + 2, T):
        for net in (model, twin):
            net.set_timesteps(timesteps)
        torch.testing.assert_close(model(x, per_step=True), twin(x, per_step=True), **ROUND_OFF)


@pytest.mark.parametrize('norm', NORMS)
def test_equal_at_every_number_of_timesteps(norm):
    model, x = _net(norm), _images()
    twin = copy.deepcopy(model)
    rates = []
    for neuron in twin.neurons().values():
        neuron.register_forward_hook(lambda m, args, out: rates.append(out.mean().item()))
    twin(x)
    assert all(.02 < rate < .98 for rate in rates), rates  # no layer is silent, which would hide what is folded
    assert fold_norms(model, x[:1]) is model
    folds = _folds(model)
    assert folds['bn1'].into.startswith('conv1.weight, conv1.bias') and folds['bn5'].into.startswith('fc.weight')
    assert folds['bn2'].into == 'conv2.weight, conv2.bias' and folds['bn4'].into == 'conv3.weight, conv3.bias'
    assert folds['bn3'].into == 'stays: its input comes from a neuron'
    _assert_equal_over_time(model, twin, x)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(x), model(x))


def test_what_a_fold_leaves():
    by_norm = {norm: fold_norms(_net(norm), _images()) for norm in NORMS}
    weights = {norm: [tuple(layer.weight.shape) for layer in (model.conv1, model.conv2)]
               for norm, model in by_norm.items()}
    one = [(8, 3, 3, 3), (8, 8, 3, 3)]
    assert weights[None] == weights['tdbn'] == weights['mpbn'] == one
    assert weights['bntt'] == weights['tab'] == [(T, *shape) for shape in one]
    assert weights['tebn'] == [one[0], (T, *one[1])]  # a sum is behind the second norm
    tebn = by_norm['tebn']
    assert tebn.act1.step_gain.shape == (T,) and 'step_gain' not in tebn.act2._buffers
    assert not any('membrane_norm' in name for name in by_norm['mpbn'].state_dict())
    assert by_norm['mpbn'].settings.norm is None and by_norm['tebn'].settings.norm == 'tebn'  # bn3 is left


def test_gains_fold_before():
    for norm in NORMS:
        model = _net(norm)
        twin = copy.deepcopy(model)
        fold_norms(fold_gains(model, _images()), _images())
        assert [name for name, neuron in model.neurons().items() if neuron.gain is not None] == ['act2']
        _assert_equal_over_time(model, twin, _images())


@pytest.mark.parametrize('options', [
    dict(norm='tebn', residual='ms'), dict(norm='tebn', residual='sew', neuron='plif'), dict(norm='tab', neuron='glif'),
    dict(norm='bntt', neuron='psn')], ids=lambda o: '-'.join(o.values()))
def test_timm_models(options):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = timm.create_model('spiking_test_resnet', num_classes=K, timesteps=T, **options).double()
    model = _trained(model, x, steps=10)
    twin = copy.deepcopy(model)
    fold_norms(model, x[:1])
    assert all(fold.done for fold in model.spiking_report().folds) and model.settings.norm is None
    currents = [[], []]
    for net, seen in zip((model, twin), currents):
        neuron = net.layer4[0].act1
        neuron.register_forward_hook(lambda m, args, out, seen=seen: seen.append(args[0]))
        factor = getattr(neuron, 'step_gain', torch.ones(T, dtype=x.dtype))
        with torch.no_grad():
            net(x)
        seen[0] = (seen[0].unflatten(0, (T, -1)) * factor.view(-1, 1, 1, 1, 1)).flatten(0, 1)
    torch.testing.assert_close(*[seen[0] for seen in currents], **ROUND_OFF)
    assert currents[0][0].std() > .01
    if options.get('neuron') != 'psn':  # which runs no more timesteps than it was made for
        _assert_equal_over_time(model, twin, x)


# ---- MPBN's thresholds, by hand

def _fires(gamma, beta, u):
    """Spikes of an MPBN neuron without leak after the fold, with mean 1 and deviation 2, at the currents u."""
    model = convert_to_spiking(_Net(), timesteps=1, norm='mpbn', tau=0.).double()
    norm = model.act1.membrane_norm
    with torch.no_grad():
        norm.eps = 1e-30
        for tensor, value in ((norm.running_mean, 1.), (norm.running_var, 4.), (norm.weight, gamma), (norm.bias, beta)):
            tensor.fill_(value)
        fold_norms(model.eval(), _images())
        with model.time_folded():
            return model.act1(u.view(-1, 1, 1, 1).expand(-1, 8, 1, 1))[:, 0, 0, 0].bool()


def test_thresholds_by_hand():
    """theta~ = mean + (theta - beta) * deviation / gamma, theta = 0.5; NEURONS' values, all exact in binary."""
    u = torch.linspace(-1, 3, 17, dtype=torch.float64)  # 0.5 and 1.5 are among them
    assert torch.equal(_fires(2., 0., u), u >= 1.5)
    assert torch.equal(_fires(-2., 0., u), u <= .5)
    assert not _fires(0., .25, u).any() and _fires(0., .5, u).all() and _fires(0., .75, u).all()


def test_folded_thresholds_are_for_inference():
    model = fold_norms(_net('mpbn'), _images())
    with pytest.raises(RuntimeError, match='folded into thresholds .* cannot be trained'):
        model.train()(_images())
    model.eval()(_images())


# ---- refusals, and what must not change

def test_reasons():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.act = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()
            self.conv2, self.bn2, self.act2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, affine=False), nn.ReLU()
            self.conv3, self.bn3, self.act3 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()

        def forward(self, x):
            x = self.act(self.bn(self.bn(self.conv(x))))
            x = self.act2(self.bn2(self.conv2(x)))
            y = self.conv3(x)
            return (self.act3(self.bn3(y)) + y).mean((2, 3))

    model = convert_to_spiking(Odd(), timesteps=T).double().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fold_norms(model, _images())
    folds = _folds(model)
    assert folds['bn'].into == 'stays: runs 2 times in a forward'
    assert folds['bn2'].into == 'stays: BatchNorm2d has no scale or a forward of its own'
    assert folds['bn3'].into == 'stays: others take its input too'
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match='_Net does not spike'):
        fold_norms(_Net(), _images())


def test_a_norm_of_ones_own_that_is_not_linear_stays():
    class Clamped(BatchNormOverTime):
        def normalise(self, x):
            return super().normalise(x).clamp(-1, 1)

    @register_variant('norm', 'clamped')
    class _Clamped(BatchNormVariant):
        mixin, label = Clamped, 'clamped'

    model = _net('clamped')
    twin = copy.deepcopy(model)
    fold_gains(fold_norms(model, _images()), _images())
    folds = _folds(model)
    assert folds['act1'].into == 'stays: the output of the BatchNorm2d before it does not scale with its weight'
    _assert_equal_over_time(model, twin, _images())
    fold_norms(model, _images())
    assert _folds(model)['bn1'].into == 'stays: BatchNorm2d is not linear in its input'


def test_a_shared_stem_after_the_fold():
    """A map per timestep in the stem is refused; TEBN's factor is in the neuron, which repeats one current."""
    model = fold_norms(_net('bntt'), _images())
    with pytest.raises(ValueError, match=r'conv1 \(Conv2d\) computes something else at every time step'):
        share_stem(model, input_size=(3, 12, 12))
    model = fold_norms(_net('tebn'), _images())
    with torch.no_grad():
        before = model(_images(), per_step=True)
        share_stem(model, input_size=(3, 12, 12))
        torch.testing.assert_close(model(_images(), per_step=True), before, **ROUND_OFF)
