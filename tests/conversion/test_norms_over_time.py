"""TEBN, BNTT and TAB: their formulas by hand, statistics, parameters per timestep, ANN weights and checkpoints."""
import copy

import pytest
import timm
import torch
import torch.nn as nn

from timm_sscl import calibrate, convert_to_spiking, fold_gains, share_stem

T, B, C, K = 3, 4, 5, 4
NORMS = 'tebn', 'bntt', 'tab'
EXACT = dict(rtol=1e-10, atol=1e-10)  # float64, the same formula in another order


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act, self.fc = nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), nn.ReLU(), nn.Linear(C, K)

    def forward(self, x):
        return self.fc(self.act(self.bn(self.conv(x))).mean((2, 3)))


def _randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _net(norm, timesteps=T, **options):
    """A net whose norm has other parameters for every timestep and channel."""
    torch.manual_seed(0)
    model = convert_to_spiking(_Net(), timesteps=timesteps, norm=norm, input_size=(3, 8, 8), **options).double()
    with torch.no_grad():
        for i, p in enumerate(model.bn.parameters()):
            p.copy_(1 + .3 * _randn(*p.shape, seed=i))
    return model


def _run(model, x):
    """The norm alone on (T, B, C, ...)."""
    with model.time_folded():
        return model.bn(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def _normalise(x, over, eps):
    """x normalised by the mean and variance of `over`, (steps, B, C, ...)."""
    mean, var = over.mean((0, 1, 3, 4), keepdim=True)[0], over.var((0, 1, 3, 4), unbiased=False, keepdim=True)[0]
    return (x - mean) / (var + eps).sqrt()


def _by_hand(norm, x):
    """TEBN, BNTT and TAB as their papers print them, step by step."""
    channels = lambda v: v.view(1, -1, 1, 1)
    out = []
    for t in range(len(x)):
        if norm.label == 'tebn':
            y = norm.step_scale[t] * (_normalise(x[t], x, norm.eps) * channels(norm.weight) + channels(norm.bias))
        elif norm.label == 'bntt':
            y = _normalise(x[t], x[t:t + 1], 1e-4) * channels(norm.weight[t])
        else:
            y = _normalise(x[t], x[:t + 1], norm.eps) * channels(norm.weight[t]) + channels(norm.bias[t])
            y = y * norm.step_scale[t] ** 2
        out.append(y)
    return torch.stack(out)


@pytest.mark.parametrize('name', NORMS)
def test_formula_and_gradients(name):
    model = _net(name).train()
    model.bn.label = name
    x, weight = (3 + 2 * _randn(T, B, C, 4, 3)).requires_grad_(), _randn(T, B, C, 4, 3, seed=1)
    inputs = [x, *model.bn.parameters()]
    expected = _by_hand(model.bn, x)
    torch.testing.assert_close(_run(model, x), expected, **EXACT)
    grads = torch.autograd.grad((_run(model, x) * weight).sum(), inputs)
    for a, b in zip(grads, torch.autograd.grad((expected * weight).sum(), inputs)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize('name', NORMS)
@pytest.mark.parametrize('momentum', [.3, None])
def test_statistics_in_training_and_evaluation(name, momentum):
    model = _net(name, **(dict(norm_kwargs=dict(momentum=momentum)) if name == 'bntt' else {})).train()
    norm = model.bn
    norm.momentum = momentum
    batches = [3 + 2 * _randn(T, B, C, 4, 3, seed=i) for i in range(2)]
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    for i, x in enumerate(batches):
        _run(model, x)
        rate = momentum or 1 / (i + 1)
        for t in range(T):
            over = {'tebn': x, 'bntt': x[t:t + 1], 'tab': x[:t + 1]}[name].movedim(2, 0).flatten(1)
            row = (lambda v: v) if name == 'tebn' else (lambda v: v[t])
            if name != 'tebn' or t == 0:
                row(mean).lerp_(over.mean(1), rate)
                row(var).lerp_(over.var(1), rate)
    torch.testing.assert_close(norm.running_mean, mean, **EXACT)
    torch.testing.assert_close(norm.running_var, var, **EXACT)
    assert norm.num_batches_tracked == 2
    out, x = _run(model.eval(), batches[0]), batches[0]
    for t in range(T):
        m, v, w = (s.view(-1, C)[t if name != 'tebn' else 0] for s in (mean, var, norm.weight))
        y = (x[t] - m.view(-1, 1, 1)) / (v + norm.eps).sqrt().view(-1, 1, 1) * w.view(-1, 1, 1)
        if name != 'bntt':
            y = y + norm.bias.view(-1, C)[t if name == 'tab' else 0].view(-1, 1, 1)
            y = y * norm.step_scale[t] ** (2 if name == 'tab' else 1)
        torch.testing.assert_close(out[t], y, **EXACT)
    assert norm.num_batches_tracked == 2


def _plain_pair(name):
    torch.manual_seed(0)
    return convert_to_spiking(_Net(), timesteps=2, norm=name, input_size=(3, 8, 8)).double().train()


def test_second_step_of_tebn_is_doubled_with_its_shift():
    model = _plain_pair('tebn')
    x = _randn(1, B, C, 4, 4).expand(2, -1, -1, -1, -1)
    with torch.no_grad():
        model.bn.bias.fill_(.5)
        model.bn.step_scale.copy_(torch.tensor([1., 2.]))
        out = _run(model, x)
    assert torch.equal(out[1], 2 * out[0]) and not torch.allclose(out[0].mean(), torch.zeros((), dtype=out.dtype))


def test_bntt_normalises_every_step_by_itself():
    x = _randn(1, B, C, 4, 4)
    out = _run(_plain_pair('bntt'), torch.cat([x, x + 10]))
    torch.testing.assert_close(out[0], out[1], **EXACT)


def test_tab_normalises_by_all_steps_so_far():
    model = _plain_pair('tab')
    model.bn.eps = 1e-30
    x = torch.tensor([[-1., 1.], [1., 3.]], dtype=torch.float64).view(2, 2, 1, 1, 1).expand(-1, -1, C, -1, -1)
    with torch.no_grad():
        out = _run(model, x)[:, :, 0].flatten(1)
    torch.testing.assert_close(out, torch.tensor([[-1., 1.], [0., 2 ** .5]], dtype=torch.float64), **EXACT)


def _create(name, **options):
    torch.manual_seed(0)
    return timm.create_model('spiking_test_resnet', num_classes=K, norm=name, **{'timesteps': T, **options})


def _images(n=2):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def _trained(name):
    model = _create(name)
    calibrate(model, _images())
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    model.train()(_images(8))
    return model.eval()


def _logits(model):
    with torch.no_grad():
        return model(_images(), per_step=True)


@pytest.mark.parametrize('name', NORMS)
def test_weights_of_an_ann_start_it_as_plain_norms(name):
    ann = timm.create_model('test_resnet', num_classes=K)
    with torch.no_grad():
        for i, p in enumerate(ann.parameters()):
            p.copy_(.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    ann.train()(_images(8))
    model, plain = _create(name), timm.create_model('spiking_test_resnet', num_classes=K, timesteps=T)
    for net in model, plain:
        net.load_state_dict(ann.state_dict(), strict=True)
    if name == 'bntt':  # it has no shift, and another eps
        for norm in (m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)):
            nn.init.zeros_(norm.bias)
            norm.eps = 1e-4
    a, b = _logits(model.eval()), _logits(plain.eval())
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # float32
    assert a.std() > 1e-3


@pytest.mark.parametrize('name', NORMS)
def test_checkpoint_copies_and_timesteps(name, tmp_path):
    model = _trained(name)
    expected = _logits(model)
    assert {k for k in model.no_weight_decay() if k.startswith('bn1.')} == {
        'tebn': {'bn1.step_scale'}, 'bntt': {'bn1.weight'}, 'tab': {'bn1.step_scale', 'bn1.weight', 'bn1.bias'}}[name]
    torch.save(model.state_dict(), tmp_path / 'm.pth')
    overlay = dict(file=str(tmp_path / 'm.pth'), num_classes=K)
    loaded = timm.create_model('spiking_test_resnet', num_classes=K).eval()
    loaded.load_state_dict(model.state_dict())
    others = [loaded, copy.deepcopy(model), timm.create_model(
        'spiking_test_resnet', num_classes=K, pretrained=True, pretrained_cfg_overlay=overlay).eval()]
    for other in others:
        assert other.settings == model.settings and torch.equal(_logits(other), expected)
        other.set_timesteps(1)
        torch.testing.assert_close(_logits(other), expected[:1], rtol=1e-5, atol=1e-5)  # products of fewer rows
        other.set_timesteps(T + 2)
        assert torch.isfinite(_logits(other)).all() and len(_logits(other)) == T + 2
        other.train()(_images())
        other.eval().set_timesteps(T)
        assert all(p.shape == q.shape for p, q in zip(other.parameters(), model.parameters()))
    plain = timm.create_model('spiking_test_resnet', num_classes=K).eval()
    others[0]._explicit = frozenset()
    others[0].load_state_dict(plain.state_dict())
    assert torch.equal(_logits(others[0]), _logits(plain)) and others[0].settings.norm is None


@pytest.mark.parametrize('name', NORMS)
def test_trains_and_is_refused_where_steps_must_be_alike(name):
    model = _create(name)
    calibrate(model, _images())
    model.train()(_images(4)).square().sum().backward()
    own = [p for n, p in model.named_parameters() if n in model.no_weight_decay()]
    assert len(own) > 5 and all(p.grad is not None for p in own) and sum(bool(p.grad.any()) for p in own) > len(own) / 2
    with pytest.raises(ValueError, match='computes something else at every time step'):
        share_stem(model)
    x = _images().double()
    with torch.no_grad():
        before = model.eval().double()(x, per_step=True)
        folds = {f.name: f for f in fold_gains(model, x).spiking_report().folds}
        torch.testing.assert_close(model(x, per_step=True), before, rtol=1e-9, atol=1e-9)  # float64, another order
    into = 'layer1.0.bn1.weight' if name == 'bntt' else 'layer1.0.bn1.weight, layer1.0.bn1.bias'  # which has no shift
    assert folds['layer1.0.act1'].into == into and not folds['layer1.0.act2'].done  # behind a sum


@pytest.mark.parametrize('name', NORMS)
def test_half_precision_and_memory_formats(name):
    model = _trained(name)
    x = _images()
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-4)
        assert torch.isfinite(model.bfloat16()(x.bfloat16())).all()
