"""tdBN: its formula, where branches add, gradients through the neuron behind it, and what loads, folds and travels."""
import copy
import logging
import pickle

import pytest
import timm
import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d

from timm_sscl import LIF, calibrate, convert_ann, convert_to_spiking, fold_gains
from timm_sscl.neurons.kernels.batch_norm_recompute import NormSource
from timm_sscl.conversion.variants.tdbn import TdBatchNorm

T, B, C, K = 3, 4, 6, 5
V_THRESHOLD = .7
EXACT = dict(rtol=1e-12, atol=1e-12)  # float64, the same formula in another order


class _Net(nn.Module):
    """A map and a vector behind every kind of batch norm, and norms that stay."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(C, C, 3), BatchNormAct2d(C)
        self.group, self.free = nn.GroupNorm(2, C), nn.BatchNorm2d(C, affine=False)
        self.fc, self.bn3, self.act3, self.head = nn.Linear(C, C), nn.BatchNorm1d(C), nn.ReLU(), nn.Linear(C, K)

    def forward(self, x):
        x = self.free(self.group(self.bn2(self.conv2(self.act(self.bn(self.conv(x)))))))
        return self.head(self.act3(self.bn3(self.fc(x.mean((2, 3))))))


def _randomized(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.copy_(torch.rand(p.shape, generator=generator) + .5)
    return model


def _images(dtype=torch.float64, size=8):
    return torch.randn(B, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def _net(**kwargs):
    torch.manual_seed(0)
    return convert_to_spiking(_randomized(_Net()).double(), timesteps=T, v_threshold=V_THRESHOLD, norm='tdbn', **kwargs)


def _by_hand(norm, x, mean, var, alpha):
    shape = (1, 1, -1) + (1,) * (x.ndim - 3)  # (T, B, C, ...)
    normalised = (x - mean.view(shape)) / (var.view(shape) + norm.eps).sqrt()
    return norm.weight.view(shape) * (alpha * V_THRESHOLD) * normalised + norm.bias.view(shape)


@pytest.mark.parametrize('momentum', [.1, None])
@pytest.mark.parametrize('name', ['bn', 'bn2', 'bn3'])
def test_formula_over_time_batch_and_space(name, momentum):
    net = _net()
    norm = getattr(net, name)
    norm.momentum = momentum
    generator = torch.Generator().manual_seed(2)
    size = (C,) if name == 'bn3' else (C, 5, 4)
    x = 3 + 2 * torch.randn(T, B, *size, generator=generator, dtype=torch.float64)
    axes = [axis for axis in range(x.ndim) if axis != 2]
    before = {key: b.clone() for key, b in norm.named_buffers()}
    handle = norm.act.register_forward_pre_hook(lambda m, args: got.append(args[0])) if name == 'bn2' else None
    got = []

    def current(x):  # of the neuron: bn2's is inside
        got.clear()
        with net.time_folded():
            out = norm(x.flatten(0, 1))
        return (got[0] if handle else out).unflatten(0, (T, B))

    mean, var = x.mean(axes), x.var(axes, unbiased=False)
    torch.testing.assert_close(current(x), _by_hand(norm, x, mean, var, 1.), **EXACT)
    share = 1. if momentum is None else momentum
    torch.testing.assert_close(norm.running_mean, (1 - share) * before['running_mean'] + share * mean, **EXACT)
    torch.testing.assert_close(
        norm.running_var, (1 - share) * before['running_var'] + share * x.var(axes, unbiased=True), **EXACT)
    assert norm.num_batches_tracked == 1
    norm.eval()
    expected = _by_hand(norm, x, norm.running_mean, norm.running_var, 1.)
    torch.testing.assert_close(current(x), expected, **EXACT)
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize('name, added', [
    ('resnet18', {*(f'layer{i}.{j}.bn2' for i in (1, 2, 3, 4) for j in (0, 1)),
                  *(f'layer{i}.0.downsample.1' for i in (2, 3, 4))}),
    ('resnet50d', {*(f'layer{i}.{j}.bn3' for i, n in ((1, 3), (2, 4), (3, 6), (4, 3)) for j in range(n)),
                   *(f'layer{i}.0.downsample.2' for i in (1, 2, 3, 4))}),
    ('resnet19_cifar', {*(f'layer{i}.{j}.bn2' for i, n in ((1, 3), (2, 3), (3, 2)) for j in range(n)),
                        *(f'layer{i}.0.downsample.1' for i in (2, 3))}),
    ('vgg16_cifar', set()), ('test_efficientnet', set())])
def test_alpha_is_where_two_branches_add(name, added):
    with torch.device('meta'):
        model = timm.create_model(f'spiking_{name}', norm='tdbn')
    records = model.spiking_report().norms
    assert {r.name for r in records if r.alpha is not None and r.alpha != 1} == added
    assert [r.alpha for r in records if r.name in added] == pytest.approx([2 ** -.5] * len(added))
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert {r.name for r in records} == set(norms) and all(isinstance(m, TdBatchNorm) for m in norms.values())
    assert {n for n, m in norms.items() if m.alpha != 1} == added


def _recursion(x, v_threshold, tau=.25):
    """The neuron in plain autograd: surrogate window [0, 2 v_threshold], hard reset through which gradients flow."""
    v, spikes = 0., []
    for x_t in x:
        u = tau * v + x_t
        window = ((u >= 0) & (u <= 2 * v_threshold)).to(u)
        o = (u >= v_threshold).to(u) + window * (u - u.detach())
        spikes.append(o)
        v = u * (1 - o)
    return torch.stack(spikes)


@pytest.mark.parametrize('name', ['bn', 'bn2'])
def test_gradients_are_those_of_plain_recursion_and_formula(name):
    """A neuron makes its current again of what the norm keeps: it must be the scaled one."""
    net = _net()
    norm, lif = (net.bn, net.act) if name == 'bn' else (net.bn2, net.bn2.act)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(T, B, C, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    parameters = [x, norm.weight, norm.bias]
    sources = []
    lif.register_forward_pre_hook(lambda m, args: sources.append(NormSource.of(args[0])))
    with net.time_folded():
        out = norm(x.flatten(0, 1))
        spikes = (out if name == 'bn2' else lif(out)).unflatten(0, (T, B))
    assert sources[0] is not None  # not from its input: the case that this test is about
    grads = torch.autograd.grad((spikes * weight).sum(), parameters)
    axes = (0, 1, 3, 4)
    current = _by_hand(norm, x, x.mean(axes), x.var(axes, unbiased=False), 1.)
    reference = _recursion(current, V_THRESHOLD)
    assert torch.equal(spikes, reference) and 0 < spikes.mean() < 1
    for got, expected in zip(grads, torch.autograd.grad((reference * weight).sum(), parameters)):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)  # currents made again: round-off


def test_weights_of_an_ann_load_and_mean_less_current():
    ann = timm.create_model('resnet18', num_classes=K)
    model = timm.create_model('spiking_resnet18', num_classes=K, norm='tdbn', timesteps=2)
    plain = timm.create_model('spiking_resnet18', num_classes=K, timesteps=2)
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.load_state_dict(ann.state_dict(), strict=True)
    x = torch.randn(2, 64, 4, 4)
    torch.testing.assert_close(model.bn1.eval()(x), ann.bn1.eval()(x) * .5)
    assert not [name for name, _ in model.named_parameters() if name not in dict(ann.named_parameters())]


def test_other_norms_stay_and_are_reported():
    report = _net().spiking_report()
    records = {r.name: (r.was, r.now, r.alpha) for r in report.norms}
    assert records == {'bn': ('BatchNorm2d', 'tdBN', 1.), 'bn2': ('BatchNormAct2d', 'tdBN', 1.),
                       'bn3': ('BatchNorm1d', 'tdBN', 1.), 'group': ('GroupNorm', 'GroupNorm', None)}
    assert '3 tdBN, scale times the threshold 0.7' in str(report) and '1 GroupNorm as they were' in str(report)
    assert [r['name'] for r in report.as_dict()['norms']] == ['bn', 'bn2', 'group', 'bn3']
    plain = convert_to_spiking(_Net()).spiking_report()
    assert plain.norms == [] and 'tdBN' not in str(plain)


def test_settings_travel_and_the_threshold_with_them(tmp_path):
    model, x = _net(), _images()
    model.train()(x)
    with torch.no_grad():
        expected = model.eval()(x, per_step=True)
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(again(x, per_step=True), expected) and again.bn.alpha == 1.
        other = convert_to_spiking(_Net().double()).eval()
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x, per_step=True), expected)
        assert other.settings.norm == 'tdbn' and other.bn.v_threshold == V_THRESHOLD
        # and back
        plain = convert_to_spiking(_randomized(_Net()).double(), timesteps=T)
        plain.train()(x)
        other.load_state_dict(plain.state_dict())
        assert type(other.bn) is nn.BatchNorm2d and type(other.bn2) is BatchNormAct2d
        assert torch.equal(other(x, per_step=True), plain.eval()(x, per_step=True))


def test_checkpoint_path_gives_the_same_logits(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(
        'spiking_resnet20_cifar', width=8, num_classes=K, norm='tdbn', v_threshold=.6, timesteps=2)
    x = torch.randn(4, 3, 32, 32)
    model.train()(x)
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    again = timm.create_model(
        'spiking_resnet20_cifar', width=8, num_classes=K, checkpoint_path=str(tmp_path / 'model.pth'))
    with torch.no_grad():
        assert torch.equal(again.eval()(x), model.eval()(x)) and again.bn1.v_threshold == .6


def test_norms_of_a_new_head_are_tdbn_too():
    model = timm.create_model('spiking_levit_128s', norm='tdbn', num_classes=K)
    model.reset_classifier(7)
    assert isinstance(model.head.bn, TdBatchNorm) and model.head.bn.v_threshold == .5


def test_gains_fold_exactly_and_calibration_says_what_it_undoes(caplog):
    model, x = _net(), _images()
    with caplog.at_level(logging.WARNING, logger='timm_sscl'):
        calibrate(model, x)
    assert "norm='tdbn'" in caplog.text
    seen = []
    handle = model.act.register_forward_pre_hook(lambda m, args: seen.append(args[0] * m.gain))
    model.train()(x)
    handle.remove()
    # calibrate's rule: a root mean square of v_threshold / 0.5
    assert seen[0].square().mean().sqrt().item() == pytest.approx(V_THRESHOLD / .5, rel=1e-6)
    for _ in range(20):
        model(x)  # running statistics, so that it fires in evaluation mode
    model.eval()
    with torch.no_grad():
        before = model(x, per_step=True)
        folded = fold_gains(model, x[:1]).spiking_report().folds
        assert [(f.name, f.into) for f in folded if f.done] == [
            ('act', 'bn.weight, bn.bias'), ('bn2.act', 'bn2.weight, bn2.bias'), ('act3', 'bn3.weight, bn3.bias')]
        torch.testing.assert_close(model(x, per_step=True), before, rtol=1e-9, atol=1e-9)  # products reordered
    assert before.std() > 1e-3


def test_thresholds_of_an_ann_are_refused():
    model = timm.create_model('spiking_resnet20_cifar', width=8, norm='tdbn')
    with pytest.raises(ValueError, match='tdBN'):
        convert_ann(model, torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize('name', ['test_vit', 'test_convnext'])
def test_models_without_batch_norms_are_refused_by_name(name):
    ann = timm.create_model(name)
    with pytest.raises(ValueError, match=f"norm='tdbn': {type(ann).__name__} has no batch norm"):
        convert_to_spiking(ann, norm='tdbn')
    assert not [m for m in ann.modules() if isinstance(m, LIF)]


def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="norm='tbdn'.*'tdbn'"):
        timm.create_model('spiking_resnet18', norm='tbdn')
