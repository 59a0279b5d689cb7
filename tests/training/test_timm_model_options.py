"""Timm's options of the model, of devices and of precision: what is built with and without them."""
import sys
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn as nn
from accelerate.state import AcceleratorState
from timm.layers import DropBlock2d, DropPath, is_fast_norm, set_fast_norm

from timm_options import observes
from tiny_training import BASE, Posing, Tiny, parse, student
import train
from timm_sscl.training.command_line.options import OptionError, parse_args
from timm_sscl.training import processes
from timm_sscl.training.datasets import create_datasets, guard_samples, resolve_input
from timm_sscl.training.loaders import create_loaders
from timm_sscl.training.steps import loop
from timm_sscl.training.steps.loop import end_of_batches
from timm_sscl.training.processes import create_accelerator
from timm_sscl.training.student import create_student, place_model
from timm_sscl.training.task import create_task
from timm_sscl.training.teachers.teacher import create_teacher


# ---- the model

def kinds(model, kind):
    return [m for m in model.modules() if isinstance(m, kind)]


@observes('--model', '--model-kwargs', '--in-chans', '--gp', '--grad-checkpointing', '--channels-last', '--model-dtype',
          '--sync-bn', '--drop', '--drop-path', '--drop-connect', '--drop-block', '--bn-momentum', '--bn-eps')
def test_student_is_built_as_asked():
    plain = student([])
    assert type(student(['--model', 'test_vit', '--img-size', 160])).__name__ == 'VisionTransformer'
    assert student(['--model-kwargs', 'stem_width=8']).conv1[0].out_channels == 8 != plain.conv1[0].out_channels
    assert student(['--in-chans', 1]).conv1[0].in_channels == 1 != plain.conv1[0].in_channels
    assert student(['--gp', 'max']).global_pool.pool_type == 'max' != plain.global_pool.pool_type
    assert student(['--grad-checkpointing']).grad_checkpointing and not plain.grad_checkpointing
    for model, last in ((student(['--channels-last']), True), (plain, False)):
        assert model.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last) is last
    assert student(['--model-dtype', 'bfloat16']).fc.weight.dtype == torch.bfloat16 != plain.fc.weight.dtype
    assert kinds(student(['--sync-bn']), nn.SyncBatchNorm) and not kinds(plain, nn.SyncBatchNorm)
    assert student(['--drop', 0.25]).drop_rate == 0.25 and plain.drop_rate == 0
    for option in ('--drop-path', '--drop-connect'):  # the older name
        assert max(m.drop_prob for m in kinds(student([option, 0.2]), DropPath)) == pytest.approx(0.2)
    assert not kinds(plain, DropPath)
    assert kinds(student(['--drop-block', 0.3]), DropBlock2d)[0].drop_prob == 0.3 and not kinds(plain, DropBlock2d)
    net = ['--model', 'test_efficientnet']
    for option, name, value in (('--bn-momentum', 'momentum', 0.3), ('--bn-eps', 'eps', 0.01)):
        assert {getattr(m, name) for m in kinds(student([*net, option, value]), nn.BatchNorm2d)} == {value}
        assert {getattr(m, name) for m in kinds(student(net), nn.BatchNorm2d)} != {value}
    with pytest.raises(OptionError, match="--model test_resnet cannot be built.*'bn_eps'"):
        student(['--bn-eps', 0.01])


def test_spiking_student_is_built_as_asked():
    spiking = ['--model', 'spiking_test_resnet', '-T', '2']
    model = student([*spiking, '--drop-path', 0.2, '--drop', 0.1, '--gp', 'max', '--sync-bn', '--grad-checkpointing'])
    assert (model.timesteps, model.drop_rate, model.global_pool.pool_type) == (2, 0.1, 'max')
    assert model.grad_checkpointing
    assert kinds(model, DropPath) and kinds(model, nn.SyncBatchNorm)


def test_teacher_of_another_architecture_keeps_its_own_pooling_and_norms():
    args = parse(['--model', 'spiking_test_efficientnet', '--teacher', 'test_resnet', '--gp', 'max', '--bn-eps', 0.01,
                  '--drop', 0.1])
    config = resolve_input(args, Tiny())
    teacher = create_teacher(args, 10, config)[0]
    assert teacher.global_pool.pool_type == 'avg' and teacher.drop_rate == 0.1
    args.teacher = None
    assert create_teacher(args, 10, config)[0].global_pool.pool_type == 'max'


@observes('--pretrained', '--pretrained-path', '--initial-checkpoint', '--head-init-scale', '--head-init-bias')
def test_weights_of_the_student(tmp_path, monkeypatch):
    source = timm.create_model('test_resnet', num_classes=7)
    nn.init.normal_(source.conv1[0].weight, 3.)
    torch.save(source.state_dict(), tmp_path / 'seven.pth')
    adapted = student(['--pretrained-path', tmp_path / 'seven.pth'])
    assert torch.equal(adapted.conv1[0].weight, source.conv1[0].weight) and adapted.fc.weight.shape[0] == 10
    first = student(['--img-size', 8])
    assert not torch.equal(first.conv1[0].weight, source.conv1[0].weight)
    torch.save(first.state_dict(), tmp_path / 'ten.pth')
    for argv, scale, bias in (([], 1., first.fc.bias), (['--head-init-scale', 0.5], 0.5, first.fc.bias * 0.5),
                              (['--head-init-bias', -4], 1., torch.full((10,), -4.))):
        loaded = student(['--initial-checkpoint', tmp_path / 'ten.pth', *argv])
        assert torch.equal(loaded.conv1[0].weight, first.conv1[0].weight)
        assert torch.equal(loaded.fc.weight, first.fc.weight * scale) and torch.equal(loaded.fc.bias, bias)
    asked = []
    monkeypatch.setattr(
        timm.models._builder, 'load_pretrained', lambda model, **kwargs: asked.append(kwargs['pretrained_cfg']))
    student([])
    assert not asked
    student(['--pretrained'])
    assert asked[0]['architecture'] == 'test_resnet'


def test_channels_that_are_not_three():
    """Images, model and normalisation agree, also where the model's own mean and std have three values."""
    for argv in (['--in-chans', 1], ['--input-size', 1, 32, 32]):
        args = parse_args(['--model', 'test_resnet', '--train-num-samples', '64', *map(str, argv)])[0]
        datasets, model = create_datasets(args), create_student(args, 10)
        config = resolve_input(args, model)
        loader = create_loaders(args, guard_samples(args, datasets, config, 10), config, 10).train
        assert config['input_size'] == (1, 32, 32) and config['mean'] == config['std'] == (.5,)
        assert model(next(iter(loader))[0]).shape == (64, 10)
    args = parse_args(['--dataset', 'digits', '--model', 'test_resnet', '--in-chans', '1'])[0]
    config = resolve_input(args, create_student(args, 10))
    assert config['input_size'] == (1, 160, 160) and config['mean'] == (.5,)  # the model's (.5, .5, .5)
    with pytest.raises(OptionError, match='--mean: 2 values for 3 channels'):
        resolve_input(parse(['--mean', 0.1, 0.2]), Tiny())


def test_size_on_the_command_line_wins_over_the_recipes():
    assert resolve_input(parse_args(['--img-size', '48'])[0], Tiny())['input_size'] == (3, 48, 48)


# ---- devices and precision

@observes('--device', '--amp', '--amp-dtype', '--no-ddp-bb')
def test_accelerator_is_made_as_asked(monkeypatch):
    made = []
    monkeypatch.setattr(processes, 'Accelerator', lambda **kwargs: made.append(kwargs) or SimpleNamespace(
        num_processes=1, mixed_precision='no', device=torch.device('cpu')))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    for argv in (['--device', 'cuda'], [], ['--amp', '--device', 'cuda'], ['--amp', '--amp-dtype', 'bfloat16'],
                 ['--no-ddp-bb']):
        create_accelerator(parse(argv))
    assert [m['cpu'] for m in made] == [False, True, False, True, True]  # BASE says cpu
    assert [m['mixed_precision'] for m in made] == [None, None, 'fp16', 'bf16', None]
    assert [m['kwargs_handlers'][0].broadcast_buffers for m in made] == [True] * 4 + [False]
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: False)
    with pytest.raises(OptionError, match='--device cuda: PyTorch sees no accelerator'):
        create_accelerator(parse(['--device', 'cuda']))
    with pytest.raises(OptionError, match='--amp and --model-dtype bfloat16'):
        parse(['--amp', '--model-dtype', 'bfloat16'])


@pytest.mark.parametrize('argv, forward, weights', [
    ([], torch.float32, torch.float32),
    (['--amp', '--amp-dtype', 'bfloat16'], torch.bfloat16, torch.float32),
    (['--model-dtype', 'float64'], torch.float64, torch.float64),
])
def test_precision_of_a_step(argv, forward, weights, fit):
    args, seen = parse(argv), []
    model = place_model(args, Tiny())
    model.fc.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    run = fit([*argv, '--epochs', 1], model)
    train.fit(run)
    assert set(seen) == {forward} and run.task.student.fc.weight.dtype == weights


def test_model_dtype_with_the_contrastive_loss():
    args = parse(['--model', 'test_resnet', '--distill', 'sscl', '--img-size', 32, '--model-dtype', 'bfloat16'])
    config = resolve_input(args, Tiny())
    model, (teacher, teacher_input) = create_student(args, 10), create_teacher(args, 10, config)
    task = create_task(args, model, teacher, teacher_input, config, torch.device('cpu'), False)
    task(torch.randn(4, 3, 32, 32).bfloat16(), torch.arange(4))['loss'].backward()
    assert model.conv1[0].weight.grad.dtype == torch.bfloat16


@observes('--synchronize-step')
def test_synchronize_step(fit, monkeypatch):
    for argv, expected in (([], 0), (['--synchronize-step'], 1)):
        run, calls = fit(argv), []
        run.session.accelerator = Posing(run.accelerator, device=SimpleNamespace(type='cuda'))
        monkeypatch.setattr(torch.cuda, 'synchronize', lambda: calls.append(1))
        train.train_step(run, 0, next(iter(run.train_loader)))
        assert len(calls) == expected


@observes('--dist-bn')
def test_batch_norm_statistics_are_shared(fit, monkeypatch):
    calls = []
    monkeypatch.setattr(loop, 'distribute_bn', lambda module, n, reduce: calls.append((n, reduce)))
    for mode, expected in (('', []), ('reduce', [(2, True)] * 2), ('broadcast', [(2, False)] * 2)):
        run = fit(['--dist-bn', mode, '--model-ema', '--epochs', 1])
        run.session.accelerator = Posing(run.accelerator, num_processes=2)
        calls.clear()
        end_of_batches(run)
        assert calls == expected  # the model's, and its average's
    calls.clear()
    train.fit(fit(['--epochs', 1]))
    assert not calls  # one process has nobody to share with


@observes('--fast-norm', '--device-modules')
def test_what_is_set_before_anything_is_built(tmp_path, monkeypatch):
    (tmp_path / 'some_device.py').write_text('')
    monkeypatch.syspath_prepend(tmp_path)

    def nothing_more(*args):
        seen.append((is_fast_norm(), 'some_device' in sys.modules))
        raise OptionError('enough')
    monkeypatch.setattr(train, 'prepare', nothing_more)
    seen, threads, fast = [], torch.get_num_threads(), is_fast_norm()
    try:
        for argv in ([], ['--device-modules', 'some_device'], ['--fast-norm']):
            AcceleratorState._reset_state(reset_partial_state=True)
            with pytest.raises(SystemExit):
                train.main([*BASE, *argv])
    finally:
        set_fast_norm(fast)
        torch.set_num_threads(threads)
        sys.modules.pop('some_device', None)
    assert seen == [(False, False), (False, True), (True, True)]


@observes('--torchcompile', '--torchcompile-mode')
def test_compiled_by_the_backend_and_mode_asked_for(fit, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, 'compile', lambda module, **kwargs: calls.append(kwargs) or module)
    fit([])
    assert not calls
    fit(['--torchcompile'])
    assert {(c['backend'], c['mode']) for c in calls} == {('inductor', None)}
    calls.clear()
    fit(['--torchcompile', 'eager', '--torchcompile-mode', 'max-autotune'])
    assert {(c['backend'], c['mode']) for c in calls} == {('eager', 'max-autotune')}
