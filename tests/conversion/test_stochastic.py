"""Dropout and stochastic depth in a spiking model: one mask per sample, kept over its time steps."""
import copy
import pickle
from typing import Dict, NamedTuple

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from timm.layers import DropPath, PatchDropout
from timm.layers.drop import DropBlock2d

from timm_sscl import LIF, convert_to_spiking

T, K = 3, 5

# float64 sums whose order depends on the place in the batch; a mask that differs shows at 1e-3 and more
ROUND_OFF = dict(rtol=1e-9, atol=1e-10)


class _Probe(nn.Module):
    """Its output is what a dropout-like layer makes of the input; the neuron is there to make it convertible."""

    def __init__(self, drop: nn.Module):
        super().__init__()
        self.act, self.drop = nn.ReLU(), drop

    def forward(self, x):
        return self.drop(x + 0 * self.act(x))


class _Functional(nn.Module):
    def __init__(self, p: float = .3):
        super().__init__()
        self.p = p

    def forward(self, x):
        return F.dropout(x, p=self.p, training=self.training)


class _TorchDropout(_Functional):
    def forward(self, x):
        return torch.dropout(x, self.p, self.training)


class _Dropout(nn.Dropout):
    """A user's subclass that changes nothing."""


IMAGE, TOKENS, SIGNAL = (4, 8, 8), (17, 8), (8, 16)


class Layer(NamedTuple):
    build: object
    shape: tuple
    kept: float = 1 / .7  # value of a kept entry


LAYERS = {
    'dropout': Layer(lambda: nn.Dropout(.3), IMAGE),
    'dropout_inplace': Layer(lambda: nn.Dropout(.3, inplace=True), IMAGE),
    'dropout_subclass': Layer(lambda: _Dropout(.3), IMAGE),
    'dropout1d': Layer(lambda: nn.Dropout1d(.3), SIGNAL),
    'dropout2d': Layer(lambda: nn.Dropout2d(.3), IMAGE),
    'drop_path': Layer(lambda: DropPath(.3), IMAGE),
    'drop_path_unscaled': Layer(lambda: DropPath(.3, scale_by_keep=False), IMAGE, 1.),
    'stochastic_depth': Layer(lambda: torchvision.ops.StochasticDepth(.3, 'row'), IMAGE),
    'functional': Layer(_Functional, IMAGE),
    'torch_dropout': Layer(_TorchDropout, IMAGE),
}
every_layer = pytest.mark.parametrize('layer', LAYERS)


def _probe(drop: nn.Module, timesteps: int = T) -> nn.Module:
    return convert_to_spiking(_Probe(drop), timesteps=timesteps).train()


@every_layer
def test_layer_keeps_one_mask_over_time(layer):
    torch.manual_seed(0)
    build, shape, kept = LAYERS[layer]
    model, x = _probe(build()), torch.ones(64, *shape)
    steps = model(x, per_step=True)
    assert steps.shape == (T, 64, *shape)
    assert all(torch.equal(s, steps[0]) for s in steps)  # exact: the same mask times the same ones
    assert not all(torch.equal(s, steps[0, 0]) for s in steps[0])  # another mask for another sample
    assert not torch.equal(model(x, per_step=True), steps)  # and at another call
    values = torch.tensor([0., kept])
    assert ((steps.unsqueeze(-1) - values).abs().min(-1).values < 1e-6).all()  # float32's 1 / .7
    assert (steps == 0).any()


@every_layer
def test_layer_is_the_identity_in_eval_mode(layer):
    build, shape, _ = LAYERS[layer]
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    out = _probe(build()).eval()(x, per_step=True)
    assert all(torch.equal(step, x) for step in out)


@every_layer
def test_layer_keeps_the_expectation(layer):
    torch.manual_seed(0)
    build, shape, kept = LAYERS[layer]
    batch = 4000
    mean = _probe(build())(torch.ones(batch, *shape)).mean()
    draws = {'dropout1d': batch * shape[0], 'dropout2d': batch * shape[0], 'drop_path': batch,
             'drop_path_unscaled': batch, 'stochastic_depth': batch}.get(layer, batch * torch.Size(shape).numel())
    # a draw is kept * Bernoulli(.7), of variance kept^2 .7 .3; 5 sigma of the mean of all draws, with a fixed seed
    assert abs(mean.item() - .7 * kept) < 5 * kept * (.7 * .3 / draws) ** .5


def test_dropout2d_drops_whole_channels_and_drop_path_whole_samples():
    torch.manual_seed(0)
    channels = _probe(nn.Dropout2d(.3))(torch.ones(32, *IMAGE))
    assert torch.equal(channels, channels[..., :1, :1].expand_as(channels)) and channels.unique().numel() == 2
    assert channels[:, :, 0, 0].std(1).gt(0).any()  # not whole samples
    samples = _probe(DropPath(.3))(torch.ones(32, *IMAGE))
    assert torch.equal(samples, samples[:, :1, :1, :1].expand_as(samples)) and samples.unique().numel() == 2


@pytest.mark.parametrize('couple', [True, False])
def test_drop_block(couple):
    torch.manual_seed(0)
    model, x = _probe(DropBlock2d(.2, block_size=3, couple_channels=couple)), torch.ones(64, *IMAGE)
    steps = model(x, per_step=True)
    assert all(torch.equal(s, steps[0]) for s in steps)
    assert not torch.equal(steps[0, 0], steps[0, 1]) and not torch.equal(model(x, per_step=True), steps)
    # it divides by the share that was kept, so that the mean is 1 for every draw; float32 sums of 16 k entries
    assert abs(steps.mean().item() - 1) < 1e-4
    # blocks: the share of dropped entries is near drop_prob (edges and overlaps aside), and zeros come in threes
    assert .1 < (steps == 0).float().mean() < .3
    assert torch.equal(model.eval()(x), x)


class _PatchProbe(nn.Module):
    def __init__(self, drop):
        super().__init__()
        self.act, self.drop = nn.ReLU(), drop

    def forward(self, x):
        self.act(x)
        return self.drop(x)


@pytest.mark.parametrize('ordered', [True, False])
def test_patch_dropout_keeps_the_same_patches(ordered):
    torch.manual_seed(0)
    model = convert_to_spiking(_PatchProbe(PatchDropout(.5, num_prefix_tokens=1, ordered=ordered)), timesteps=T).train()
    x = torch.arange(17.).view(1, 17, 1).repeat(64, 1, 8)
    steps = model(x, per_step=True)
    assert steps.shape == (T, 64, 1 + 8, 8)
    assert all(torch.equal(s, steps[0]) for s in steps)
    assert (steps[0, :, 0] == 0).all()  # the prefix token stays, first
    patches = steps[0, :, 1:, 0]
    assert all(row.unique().numel() == 8 for row in patches) and (patches >= 1).all()
    assert not all(torch.equal(row.sort().values, patches[0].sort().values) for row in patches)
    assert torch.equal(patches.sort(1).values, patches) is ordered
    # each of the 16 patches is kept in half of 64 samples: binomial, 5 sigma = 20
    assert all(abs((patches == i).sum() - 32) < 20 for i in range(1, 17))
    assert torch.equal(model.eval()(x), x)


def test_mask_follows_set_timesteps():
    torch.manual_seed(0)
    for drop in (nn.Dropout(.3), DropPath(.3), _Functional()):
        model = _probe(drop, timesteps=2)
        model.set_timesteps(5)
        steps = model(torch.ones(3, *IMAGE), per_step=True)
        assert steps.shape[0] == 5 and all(torch.equal(s, steps[0]) for s in steps)


def test_gradient_passes_the_mask():
    torch.manual_seed(0)
    for drop in (nn.Dropout(.3), DropPath(.3), _Functional()):
        x = torch.ones(8, *IMAGE, requires_grad=True)
        out = _probe(drop)(x)
        out.sum().backward()
        # the mask itself; a mean over T in float32
        torch.testing.assert_close(x.grad, out.detach(), rtol=1e-6, atol=0.)


@pytest.mark.parametrize('p', [0., 1.])
def test_extreme_probabilities(p):
    x = torch.ones(4, *IMAGE)
    for drop in (nn.Dropout(p), nn.Dropout2d(p), DropPath(p), _Functional(p)):
        assert torch.equal(_probe(drop)(x, per_step=True), torch.full((T, 4, *IMAGE), 1. - p))


def test_functional_dropout_in_the_model_itself():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x):
            return F.dropout(x + 0 * self.act(x), .3, self.training)

    torch.manual_seed(0)
    model, x = convert_to_spiking(Net(), timesteps=T).train(), torch.ones(8, *IMAGE)
    steps = model(x, per_step=True)
    assert all(torch.equal(s, steps[0]) for s in steps) and not torch.equal(steps[0, 0], steps[0, 1])
    assert torch.equal(model.eval()(x), x)


class _InTimmStyle(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()

    def forward_features(self, x):
        return F.dropout(x + 0 * self.act(x), .3, self.training)

    def forward_head(self, x, pre_logits=False):
        return F.dropout(x, .5, self.training).mean((2, 3))

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


@pytest.mark.parametrize('call', ['forward', 'forward_features'])
def test_functional_dropout_in_forward_features(call):
    torch.manual_seed(0)
    model, x = convert_to_spiking(_InTimmStyle(), timesteps=T).train(), torch.ones(8, *IMAGE)
    steps = model(x, per_step=True) if call == 'forward' else model.forward_features(x).unflatten(0, (T, 8))
    assert all(torch.equal(s, steps[0]) for s in steps) and not torch.equal(steps[0, 0], steps[0, 1])


def test_dropout_outside_a_spiking_model_is_untouched():
    torch.manual_seed(0)
    _probe(_Functional())(torch.ones(2, *IMAGE))
    assert type(nn.Dropout(.3)) is nn.Dropout
    for dropped in (nn.Dropout(.5)(torch.ones(T, 64)), F.dropout(torch.ones(T, 64), .5)):
        assert not torch.equal(dropped[0], dropped[1])


def test_noise_that_cannot_be_shared_is_refused_by_name():
    for layer in (nn.AlphaDropout(.3), nn.FeatureAlphaDropout(.3), DropBlock2d(.3, with_noise=True)):
        with pytest.raises(NotImplementedError, match=type(layer).__name__):
            convert_to_spiking(_Probe(layer))
    attention = nn.MultiheadAttention(8, 2, dropout=.1, batch_first=True)
    with pytest.raises(NotImplementedError, match=r"'drop' \(MultiheadAttention\)"):
        convert_to_spiking(_Probe(attention))


# ---------------------------------------------------------------------------------------------------- timm models

class Case(NamedTuple):
    name: str
    kwargs: Dict[str, object]
    neuron: Dict[str, object] = {}
    size: int = 64


NARROW = dict(channels=(16, 24, 32, 40))
VIT, LOW = dict(img_size=32), dict(v_threshold=.05)  # a low threshold wakes the layers behind a LayerNorm
DENSE = dict(growth_rate=8, block_config=(2, 2, 2, 2))
CASES = {
    'resnet-drop': Case('resnet18', dict(NARROW, drop_rate=.5)),
    'resnet-path': Case('resnet18', dict(NARROW, drop_path_rate=.5, zero_init_last=False)),
    'resnet-block': Case('resnet18', dict(NARROW, drop_block_rate=.3, zero_init_last=False)),
    'vgg-drop': Case('vgg11_bn', dict(mlp_ratio=1 / 64, drop_rate=.5), {}, 32),
    'regnet-drop': Case('regnetx_002', dict(drop_rate=.5)),
    'regnet-path': Case('regnety_002', dict(drop_path_rate=.5, zero_init_last=False)),
    'efficientnet-drop': Case('test_efficientnet', dict(drop_rate=.5)),
    'efficientnet-path': Case('mobilenetv2_035', dict(drop_path_rate=.5)),
    'mobilenetv3-drop': Case('mobilenetv3_small_050', dict(drop_rate=.5)),
    'densenet-drop': Case('densenet121', dict(DENSE, drop_rate=.5)),
    'densenet-proj': Case('densenet121', dict(DENSE, proj_drop_rate=.3)),
    'convnext-drop': Case('test_convnext', dict(drop_rate=.5), LOW, 32),
    'convnext-path': Case('test_convnext', dict(drop_path_rate=.5, ls_init_value=1.), LOW, 32),
    'vit-drop': Case('test_vit', dict(VIT, drop_rate=.5), LOW, 32),
    'vit-pos': Case('test_vit', dict(VIT, pos_drop_rate=.5), LOW, 32),
    'vit-patch': Case('test_vit', dict(VIT, patch_drop_rate=.5), LOW, 32),
    'vit-proj': Case('test_vit', dict(VIT, proj_drop_rate=.3), LOW, 32),
    'vit-attn': Case('test_vit', dict(VIT, attn_drop_rate=.5), LOW, 32),
    'vit-path': Case('test_vit', dict(VIT, drop_path_rate=.5), LOW, 32),
    'deit-attn': Case('deit_tiny_distilled_patch16_224', dict(VIT, depth=3, attn_drop_rate=.5), LOW, 32),
}
every_case = pytest.mark.parametrize('case', CASES)


def _model(case: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    c = CASES[case]
    kwargs = {**c.kwargs, 'num_classes': K, 'timesteps': T, **c.neuron, **kwargs}
    return timm.create_model(f'spiking_{c.name}', **kwargs).double().train()


def _image(case: str, batch: int) -> torch.Tensor:
    """The same smooth image for every sample; DenseNet's stem is silent on white noise."""
    coarse = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return F.interpolate(coarse, size=(CASES[case].size,) * 2, mode='bicubic').repeat(batch, 1, 1, 1)


@every_case
@torch.no_grad()
def test_model_draws_one_mask_per_sample(case):
    """No memory (tau=0) and one image everywhere: what tells steps or samples apart is the mask alone."""
    model, x = _model(case, tau=0.), _image(case, 6)
    torch.manual_seed(1)
    steps = model(x, per_step=True)
    for step in steps[1:]:
        torch.testing.assert_close(step, steps[0], **ROUND_OFF)
    assert max((sample - steps[0, 0]).abs().max() for sample in steps[0]) > 1e-3
    assert (model(x, per_step=True) - steps).abs().max() > 1e-3
    torch.manual_seed(1)
    torch.testing.assert_close(model(x), steps.mean(0), **ROUND_OFF)  # the same draw by the other route


@every_case
@torch.no_grad()
def test_model_is_deterministic_in_eval_mode(case):
    model, x = _model(case), _image(case, 2)
    model(x)  # statistics for the norms
    model.eval()
    plain = timm.create_model(f'spiking_{CASES[case].name}', num_classes=K, timesteps=T, **CASES[case].neuron, **{
        k: v for k, v in CASES[case].kwargs.items() if 'drop' not in k or k == 'drop_block_rate'}).double().eval()
    plain.load_state_dict(model.state_dict())
    # round-off only: attention dropout turns the fused kernel off
    torch.testing.assert_close(model(x), plain(x), **ROUND_OFF)
    torch.testing.assert_close(model(x)[0], model(x)[1], **ROUND_OFF)


CHECKPOINTED = ['resnet-path', 'resnet-block', 'regnet-path', 'efficientnet-path', 'densenet-proj', 'convnext-path',
                'vit-proj', 'vit-attn', 'vit-path', 'vit-patch']


@pytest.mark.parametrize('case', CHECKPOINTED)
def test_checkpointing_repeats_the_masks(case):
    """A recomputed block must draw what it drew in the forward, or its gradients belong to another network."""
    x, y = _image(case, 3) * torch.tensor([1., .7, .4]).double().view(3, 1, 1, 1), torch.tensor([0, 1, 2])
    results = []
    for checkpointing in (False, True):
        model = _model(case)
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(2)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
    (loss, grads), (other_loss, other_grads) = results
    torch.testing.assert_close(other_loss, loss, **ROUND_OFF)
    assert any(g.any() for g in grads.values())
    for name, grad in grads.items():
        torch.testing.assert_close(other_grads[name], grad, msg=lambda m: f'{name}: {m}', **ROUND_OFF)


@pytest.mark.parametrize('name', ['test_vit', 'vit_tiny_patch16_224', 'deit_tiny_distilled_patch16_224'])
def test_attention_dropout_turns_the_fused_kernel_off(name):
    """The fused kernel draws its mask inside, another one at every step."""
    def attentions(**kwargs):
        model = timm.create_model(name, img_size=32, **kwargs)
        fused = [m.fused_attn for m in model.modules() if hasattr(m, 'fused_attn')]
        model = convert_to_spiking(model)
        return fused, [m.fused_attn for m in model.modules() if hasattr(m, 'fused_attn')]

    fused, now = attentions(attn_drop_rate=.5)
    assert any(fused) and now and not any(now)
    fused, now = attentions()
    assert any(fused) and now == fused  # without dropout it stays fast


@pytest.mark.parametrize('clone', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['deepcopy', 'pickle'])
@pytest.mark.parametrize('case', ['resnet-drop', 'resnet-block', 'densenet-proj', 'vit-attn', 'vit-patch'])
@torch.no_grad()
def test_copies_draw_the_same(case, clone):
    model, x = _model(case), _image(case, 2)
    other = clone(model)
    torch.manual_seed(1)
    out = model(x, per_step=True)
    torch.manual_seed(1)
    assert torch.equal(other(x, per_step=True), out)  # exact: the same operations
    other.set_timesteps(2)
    assert other(x, per_step=True).shape[0] == 2 and model(x, per_step=True).shape[0] == T


@torch.no_grad()
def test_new_head_after_reset_classifier_shares_its_mask():
    model, x = _model('resnet-drop', tau=0.), _image('resnet-drop', 4)
    model.reset_classifier(7)
    model.double().train()
    steps = model(x, per_step=True)
    assert steps.shape == (T, 4, 7)
    torch.testing.assert_close(steps[1], steps[0], **ROUND_OFF)
    assert (steps[0, 0] - steps[0, 1]).abs().max() > 1e-3


@torch.no_grad()
def test_masks_are_shared_for_event_frames_too():
    model = _probe(nn.Dropout(.3))
    torch.manual_seed(0)
    frames = torch.full((8, T, *IMAGE), 2.)
    steps = model(frames, per_step=True)
    assert all(torch.equal(s, steps[0]) for s in steps) and not torch.equal(steps[0, 0], steps[0, 1])


def test_neurons_are_still_binary_under_dropout():
    model, outputs = _model('densenet-proj'), []
    for module in model.modules():
        if isinstance(module, LIF):
            module.register_forward_hook(lambda m, i, o: outputs.append(o))
    model(_image('densenet-proj', 2))
    assert outputs and all(((o == 0) | (o == 1)).all() for o in outputs)


class _SpatialDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act, self.head = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Linear(8, 5)

    def forward(self, x):
        x = self.act(self.conv(x))
        self.mask = F.dropout2d(torch.ones_like(x), .5, self.training)
        return self.head((x * self.mask).mean((2, 3)))


def test_spatial_dropout_as_a_function_has_one_mask_over_time():
    torch.manual_seed(0)
    model = convert_to_spiking(_SpatialDropout(), timesteps=3).train()
    model(torch.randn(2, 3, 8, 8))
    mask = model.mask.view(3, 2, 8, -1)
    assert torch.equal(mask, mask[:1, :, :, :1].expand_as(mask)) and set(mask.unique().tolist()) == {0, 2}
    assert not torch.equal(mask[0, 0], mask[0, 1])  # another one for each sample
    model.eval()(torch.randn(2, 3, 8, 8))
    assert (model.mask == 1).all()


class _Noise(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x) if self.training else x


class _Rand(nn.Module):
    def __init__(self, also=None):
        super().__init__()
        self.also = also

    def forward(self, x):
        x = x * (torch.rand(len(x), 1, 1, 1) > .5)
        return x if self.also is None else self.also(x)


@pytest.mark.parametrize('noise,per_step', [
    (_Noise(lambda x: x + torch.randn_like(x)), True),
    (_Noise(lambda x: x * torch.bernoulli(torch.full((len(x), 1, 1, 1), .5))), True),
    (_Noise(lambda x: x * torch.empty(len(x), 1, 1, 1).bernoulli_(.5)), True),
    (_Noise(lambda x: F.dropout(x, .5)), True),  # a function that the source of the module does not show
    (_Noise(lambda x: F.dropout(x, .5, training=False)), False),
    (_Noise(lambda x: x), False),
    (_Rand(), False),
    (_Rand(lambda x: x + torch.randn(x.shape)), True),
    (_Functional(), False),
    (DropPath(.3), False), (DropBlock2d(.3), False), (nn.Dropout2d(.3), False),
])
def test_the_report_tells_of_noise_that_differs_between_the_steps(noise, per_step):
    model = convert_to_spiking(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), noise), timesteps=T).train()
    with model.time_folded():
        steps = model[2](torch.ones(T * 2, 4, 8, 8)).unflatten(0, (T, 2))
    assert per_step == (not torch.equal(steps[0], steps[1]))
    assert ('random numbers differ between the time steps in 2' in str(model.spiking_report())) == per_step
