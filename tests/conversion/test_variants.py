"""Variants by name: a user's own norm and residual in a converted model, its checkpoints, its options, its errors."""
import copy
import logging
import pickle
from dataclasses import dataclass
from functools import partial

import pytest
import timm
import torch
import torch.nn as nn
from timm.models.resnet import BasicBlock
from timm.optim import param_groups_weight_decay

from timm_sscl import (
    Variant, calibrate, convert_ann, convert_to_spiking, list_variants, register_variant, set_stem_pool, share_stem,
    unregister_variant)
from timm_sscl.class_swap import Mixin, mix_in, take_out
from timm_sscl.conversion import BatchNormOverTime, BatchNormVariant, PerStepSettings, VariantRecord, VariantSettings
from timm_sscl.knobs import knob
from timm_sscl.training.command_line.options import OptionError, parse_args
from timm_sscl.training.student import create_student

K, T = 4, 3


class StepScaledNorm(BatchNormOverTime):
    own_state = ('step_scale',)
    per_step = True

    def normalise(self, x):
        scale = self.step_scale[torch.arange(self.timesteps).clamp(max=len(self.step_scale) - 1)]
        steps = super().normalise(x).unflatten(0, (self.timesteps, -1))
        return (steps * scale.view(-1, *(1,) * (steps.ndim - 1))).flatten(0, 1)


class StepScale(BatchNormVariant):
    """A learnable factor per timestep behind every batch norm."""
    mixin = StepScaledNorm
    label = 'step scaled'
    changes_state = True

    @dataclass(frozen=True)
    class Settings(PerStepSettings):
        start: float = knob(1., 'factor at the start of training')

    def set_up(self, norm, settings):
        self.set_parameter(norm, 'step_scale', torch.full((self.settings.steps,), self.settings.start))


class _Halved(Mixin):
    def forward(self, x):
        return super().forward(x) * self.factor


class Halved(Variant):
    """Blocks whose output is multiplied."""
    @dataclass(frozen=True)
    class Settings(VariantSettings):
        factor: float = knob(.5, 'factor on a block\'s output')

    def _blocks(self, model):
        return [(name, m) for name, m in model.named_modules() if isinstance(m, BasicBlock)]

    def check(self, model, settings):
        if not self._blocks(model):
            raise ValueError(f'{self}: {type(model).__name__} has no BasicBlock.')

    def apply(self, model, settings):
        for _, block in self._blocks(model):
            mix_in(block, _Halved)
            block.factor = self.settings.factor

    def remove(self, model):
        for _, block in self._blocks(model):
            take_out(block, _Halved)

    def records(self, model):
        return [VariantRecord(name, 'BasicBlock', 'halved') for name, block in self._blocks(model)]

    def summary(self, model):
        return f'{len(self._blocks(model))} halved'


@pytest.fixture(autouse=True)
def own():
    register_variant('norm', 'step_scale')(StepScale)
    register_variant('residual', 'halved')(Halved)


def _images(n=4, seed=0):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def _model(**options):
    torch.manual_seed(0)
    options = {'norm': 'step_scale', 'timesteps': T, **options}
    return timm.create_model('spiking_test_resnet', num_classes=K, **options)


def _trained(**options):
    """Norms with other factors at every layer and step, and running statistics that are not the initial ones."""
    model = _model(**options)
    calibrate(model, _images())
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            if name.endswith('step_scale'):
                p.copy_(1 + .1 * i + torch.arange(len(p)) / 2)
        model.train()(_images())
    return model.eval()


def _logits(model, **kwargs):
    with torch.no_grad():
        return model(_images(2, seed=1), per_step=True, **kwargs)


def _assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # float32 products of another number of rows


def test_norm_computes_what_its_mixin_says():
    model = _trained()
    x = torch.randn(T * 2, 32, 5, 5, generator=torch.Generator().manual_seed(2))
    norm = model.bn1
    mean, std = norm.running_mean.view(1, -1, 1, 1), (norm.running_var + norm.eps).sqrt().view(1, -1, 1, 1)
    plain = (x - mean) / std * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)
    with torch.no_grad():
        for t in range(T):
            torch.testing.assert_close(norm(x)[2 * t:2 * t + 2], plain[2 * t:2 * t + 2] * norm.step_scale[t])


def test_parameters_train_without_weight_decay():
    model = _model(norm_kwargs=dict(start=1.5))
    own = {name: p for name, p in model.named_parameters() if name.endswith('step_scale')}
    assert len(own) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert own.keys() <= model.no_weight_decay() and all(torch.equal(p, torch.full((T,), 1.5)) for p in own.values())
    assert not [name for name in timm.create_model('spiking_test_resnet').no_weight_decay() if 'scale' in name]
    calibrate(model, _images())
    model(_images(8)).square().sum().backward()
    assert sum(bool(p.grad.any()) for p in own.values()) > len(own) / 2
    parameters = param_groups_weight_decay(model, .1, model.no_weight_decay())
    assert {id(p) for p in own.values()} <= {id(p) for p in parameters[0]['params']}
    assert parameters[0]['weight_decay'] == 0


def test_checkpoint_restores_variant_options_and_parameters(tmp_path):
    trained = _trained(norm_kwargs=dict(start=2.), residual='halved', residual_kwargs=dict(factor=.25))
    expected = _logits(trained)
    other = timm.create_model('spiking_test_resnet', num_classes=K).eval()  # nothing was asked for
    other.load_state_dict(trained.state_dict())
    assert other.settings == trained.settings and torch.equal(_logits(other), expected)
    assert dict(other.settings.norm_kwargs) == dict(start=2., steps=T)
    assert dict(other.settings.residual_kwargs) == dict(factor=.25)
    file = tmp_path / 'model.pth'
    torch.save(trained.state_dict(), file)
    overlay = dict(file=str(file), num_classes=K)
    for options in (dict(checkpoint_path=str(file)), dict(pretrained=True, pretrained_cfg_overlay=overlay)):
        assert torch.equal(_logits(timm.create_model('spiking_test_resnet', num_classes=K, **options).eval()), expected)
    for twin in copy.deepcopy(trained), pickle.loads(pickle.dumps(trained)):
        assert torch.equal(_logits(twin), expected)
        with torch.no_grad():
            twin.bn1.step_scale.fill_(9.)
    assert torch.equal(_logits(trained), expected)


def test_checkpoint_of_plain_norms_takes_the_variant_away():
    model, plain = (timm.create_model('spiking_test_resnet', num_classes=K).eval() for _ in range(2))
    model.load_state_dict(_trained(residual='halved').state_dict())
    assert model.settings.norm == 'step_scale' and model.settings.residual == 'halved'
    model.load_state_dict(plain.state_dict())
    assert model.settings == plain.settings and type(model.bn1) is type(plain.bn1)
    assert type(model.layer1[0]) is BasicBlock and model.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(_logits(model), _logits(plain))


def test_what_was_asked_for_wins(caplog):
    plain, model = timm.create_model('spiking_test_resnet', num_classes=K), _model(norm_kwargs=dict(start=3.))
    with caplog.at_level(logging.INFO, logger='timm_sscl'):
        model.load_state_dict(plain.state_dict())
    assert 'norm=None, norm=step_scale was asked for' in caplog.text and model.bn1.step_scale.tolist() == [3.] * T
    assert "without norm='step_scale'" in caplog.text
    asked = _model(timesteps=None, norm_kwargs=dict(start=3.))
    asked.load_state_dict(_trained(norm_kwargs=dict(start=2.)).state_dict())
    assert 'norm_kwargs.start=2.0, norm_kwargs.start=3.0 was asked for' in caplog.text
    assert dict(asked.settings.norm_kwargs) == dict(start=3., steps=T) and asked.timesteps == T


def test_weights_of_an_ann_load_and_the_norms_parameters_stay(tmp_path):
    ann = timm.create_model('test_resnet', num_classes=K)
    for p in ann.parameters():
        nn.init.normal_(p)
    model = _model(norm_kwargs=dict(start=2.))
    model.load_state_dict(ann.state_dict(), strict=True)
    assert model.bn1.step_scale.tolist() == [2.] * T
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in ann.state_dict().items())
    torch.save(ann.state_dict(), tmp_path / 'ann.pth')
    again = _model(norm_kwargs=dict(start=2.), pretrained=True,
                   pretrained_cfg_overlay=dict(file=str(tmp_path / 'ann.pth'), num_classes=K))
    assert torch.equal(again.bn1.weight, ann.bn1.weight)
    lacking = _trained().state_dict()
    del lacking['bn1.step_scale']
    with pytest.raises(RuntimeError, match=r'Missing key.*bn1\.step_scale'):  # a spiking checkpoint has to have it
        _model().load_state_dict(lacking)


def test_set_timesteps_takes_the_first_parameters_and_loses_none():
    model, four = _trained(), _trained()
    expected, parameter = _logits(model), model.bn1.step_scale
    model.set_timesteps(2)
    _assert_close(_logits(model), expected[:2])
    model.set_timesteps(T + 2)
    with torch.no_grad():
        model.bn1.step_scale[2:] = 5.
    _assert_close(_logits(model)[:2], expected[:2])
    model.set_timesteps(T)
    assert model.bn1.step_scale is parameter and len(parameter) == T
    four.set_timesteps(2)
    other = timm.create_model('spiking_test_resnet', num_classes=K, timesteps=6)  # T stays, parameters come
    other.load_state_dict(four.state_dict())
    assert other.timesteps == 6 and len(other.bn1.step_scale) == T
    other.set_timesteps(2)
    _assert_close(_logits(other.eval()), expected[:2])


def test_stem_with_a_norm_per_step_is_not_shared():
    model = _model()
    with pytest.raises(ValueError, match=r'conv1.1 \(BatchNorm2d\) computes something else at every time step'):
        share_stem(model)  # its factors are all 1 here, so that a probe sees nothing
    share_stem(_model(norm='tdbn'))


def test_new_head_gets_the_norm():
    model = timm.create_model('spiking_levit_128s', norm='step_scale', num_classes=K)
    model.reset_classifier(7)
    assert isinstance(model.head.bn, StepScaledNorm) and model.head.bn.step_scale.shape == (4,)


def test_averaged_copy_of_another_structure_is_refused():
    model, plain = _model(), timm.create_model('spiking_test_resnet', num_classes=K)
    plain._buffers['spiking_settings'] = model.state_dict()['spiking_settings'].clone()  # past load_state_dict
    with pytest.raises(RuntimeError, match='norm=step_scale, its own is norm=None'):
        plain(_images())


def test_class_and_partial_as_a_name():
    for norm, start in ((StepScale, 1.), (partial(StepScale, start=2.), 2.)):
        assert _model(norm=norm).settings.norm == 'step_scale' and _model(norm=norm).bn1.step_scale[0] == start
    assert _model(norm=partial(StepScale, start=2.), norm_kwargs=dict(start=3.)).bn1.step_scale[0] == 3.
    assert _model(residual=partial(Halved, factor=.1)).layer1[0].factor == .1
    with pytest.raises(ValueError, match='Other is no registered norm'):
        _model(norm=type('Other', (StepScale,), {}))


def test_names_and_errors():
    assert {'tdbn', 'step_scale'} <= set(list_variants('norm')) and 'halved' in list_variants('residual')
    assert {'norm/tdbn', 'norm/step_scale', 'residual/halved', 'stem_pool/avg', 'stem/shared'} <= set(list_variants())
    ann = timm.create_model('test_vit')
    before = [type(m) for m in ann.modules()]
    for options, message in (
            (dict(norm='step_scal'), "norm='step_scal': must be .*'step_scale'"),
            (dict(norm='step_scale', norm_kwargs=dict(strat=1.)), "'StepScale' has no option 'strat'.*'start'"),
            (dict(norm='step_scale', norm_kwargs=dict(steps=0)), '^steps=0: '),
            (dict(norm_kwargs=dict(start=1.)), "norm_kwargs={'start': 1.0}.*norm=NAME"),
            (dict(residual='halved'), "residual='halved': VisionTransformer has no BasicBlock"),
            (dict(norm='step_scale'), "norm='step_scale': VisionTransformer has no batch norm")):
        with pytest.raises(ValueError, match=message):
            convert_to_spiking(ann, **options)
    assert [type(m) for m in ann.modules()] == before
    for call in (lambda: list_variants('nrom'), lambda: register_variant('nrom', 'x')):
        with pytest.raises(ValueError, match="kind of variant 'nrom'; there are residual, stem_pool, norm, stem"):
            call()
    with pytest.raises(TypeError, match='no subclass of Variant'):
        register_variant('norm', 'relu')(nn.ReLU)
    with pytest.raises(ValueError, match="'tdbn' is registered already"):
        register_variant('norm', 'tdbn')(StepScale)
    with pytest.raises(ValueError, match='3 halved.*step scaled'):
        convert_ann(_model(residual='halved'), _images())


@pytest.mark.parametrize('kind, name', [('norm', 'step_scale'), ('residual', 'halved')])
def test_checkpoint_of_a_missing_plugin(kind, name):
    state, other = _trained(residual='halved').state_dict(), timm.create_model('spiking_test_resnet', num_classes=K)
    unregister_variant(kind, name)
    with pytest.raises(RuntimeError, match=f"made with the {kind} '{name}', which is not registered.*--plugin"):
        other.load_state_dict(state)
    assert other.settings.norm is None and type(other.bn1) is nn.BatchNorm2d


def test_report():
    report = _model(residual='halved').spiking_report()
    assert {r.now for r in report.variants['norm']} == {'step scaled'} and len(report.variants['residual']) == 3
    assert report.norms == report.variants['norm'] and 'norm: ' in str(report) and '3 halved' in str(report)


def test_stem_pool_of_a_spiking_model_is_in_its_settings():
    model = timm.create_model('spiking_resnet18', num_classes=K)
    assert set_stem_pool(model, 'avg') is model and model.settings.stem_pool == 'avg'
    assert isinstance(model.maxpool, nn.AvgPool2d)
    set_stem_pool(model, None)
    assert model.settings.stem_pool is None and isinstance(model.maxpool, nn.MaxPool2d)


def _student(*options):
    args, _ = parse_args(['--model', 'spiking_test_resnet', *options])
    return create_student(args, K)


def test_options_of_the_script():
    model = _student('--norm', 'step_scale', '--norm-kwargs', 'start=1.5', '--residual', 'halved', '--residual-kwargs',
                     'factor=.2')
    assert dict(model.settings.norm_kwargs)['start'] == 1.5 and model.layer1[0].factor == .2
    assert _student().settings.norm is None and _student().settings.residual is None
    for options, message in (
            (['--norm', 'tbdn'], '--norm tbdn: is not registered.*tdbn.*--plugin'),
            (['--residual', 'haved'], '--residual haved: is not registered.*halved.*--plugin'),
            (['--norm', 'tdbn', '--norm-kwargs', 'alpha=1'], "'TdBN' has no option 'alpha'"),
            (['--norm-kwargs', 'start=1'], 'norm_kwargs.*norm=NAME'),
            (['--model', 'test_resnet', '--residual', 'halved'], "--residual: 'test_resnet' does not spike")):
        with pytest.raises(OptionError, match=message):
            _student(*options)
