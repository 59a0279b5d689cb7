"""A residual of one's own by the public base class: its numbers, its checkpoint, its undoing."""
from dataclasses import dataclass

import pytest
import timm
import torch
import torch.nn as nn

from timm_sscl import register_variant
from timm_sscl.class_swap import Mixin, mix_in
from timm_sscl.conversion import ResidualVariant, VariantSettings, last_act, residual_branch
from timm_sscl.knobs import knob


class _Block(Mixin):
    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        return getattr(self, last_act(self))(self.branch_weight * residual_branch(self, x) + shortcut)


class _Weighted(ResidualVariant):
    mixin = _Block
    label = 'weighted'

    @dataclass(frozen=True)
    class Settings(VariantSettings):
        weight: float = knob(.5, 'factor on the branch')

    def set_up(self, model, block, settings):
        block.branch_weight = self.settings.weight

    def tear_down(self, block):
        del block.branch_weight


def _model(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('spiking_test_resnet', timesteps=2, num_classes=5, zero_init_last=False, **kwargs).eval()


def test_a_factor_on_the_branch_is_the_last_norms_scale(tmp_path):
    register_variant('residual', 'weighted')(_Weighted)
    x, one = 3 * torch.rand(2, 3, 32, 32), _model(residual='weighted', residual_kwargs=dict(weight=1.))
    plain, half = _model(), _model(residual='weighted')
    assert torch.equal(one(x, per_step=True), plain(x, per_step=True))
    for name, module in plain.named_modules():  # weight * (scale * n + shift)
        if hasattr(module, 'conv1') and hasattr(module, 'bn2'):
            last = module.bn3 if hasattr(module, 'conv3') else module.bn2
            last.weight.data *= .5
            last.bias.data *= .5
    plain.double(), half.double()
    torch.testing.assert_close(half(x.double(), per_step=True), plain(x.double(), per_step=True))
    assert not torch.equal(half.float()(x), one(x))
    torch.save(half.state_dict(), tmp_path / 'half.pth')
    loaded = _model()
    loaded.load_state_dict(torch.load(tmp_path / 'half.pth'))
    assert loaded.layer1[0].branch_weight == .5 and loaded.settings.residual == 'weighted'


def test_a_mixin_without_the_base_class_is_refused():
    class Plain:
        def forward(self, x):
            return x

    module = nn.Linear(2, 2)
    with pytest.raises(TypeError, match='Plain.* is no subclass of timm_sscl.class_swap.Mixin'):
        mix_in(module, Plain)
    assert type(module) is nn.Linear
