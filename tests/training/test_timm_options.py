"""Every option of timm's train.py stands in its group with its default, and changes here what it changes there.

timm_options.py holds the names. `observes` makes the table from option to observable: a test that runs the part of
train.py which the option is about, with and without it. What has none must stand by its
name on the manual's page of differences.
"""
import copy
import csv
import logging
import re
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from PIL import Image
from timm.data import create_transform
from timm.layers import DropBlock2d, DropPath, is_fast_norm, set_fast_norm
from timm.scheduler import (
    CosineLRScheduler, MultiStepLRScheduler, PlateauLRScheduler, PolyLRScheduler, StepLRScheduler, TanhLRScheduler)
from timm.task import LogitDistillationTask
from timm_options import TIMM_OPTIONS

import train
from timm_sscl.data import factory
from timm_sscl.training.refused_options import UNSUPPORTED
from timm_sscl.training.options import OptionError, parse_args
from timm_sscl.training.option_groups import create_parser
from timm_sscl.random_state import seeded
from timm_sscl.distillation.teacher_input import TeacherInput
from contextlib import ExitStack
from timm.task.task import TrainingTask
from timm_sscl.training import loop, processes, validation
from timm_sscl.training.datasets import create_datasets, guard_samples, resolve_input, resolve_num_classes
from timm_sscl.training.learning_rate import resolve_lr
from timm_sscl.training.loaders import create_loaders
from timm_sscl.training.loop import end_of_batches
from timm_sscl.training.processes import create_accelerator
from timm_sscl.training.resume import find_run
from timm_sscl.training.session import Session
from timm_sscl.training.state import restore_run_state, start_training
from timm_sscl.training.student import create_student, place_model
from timm_sscl.training.task import create_task
from timm_sscl.training.teacher import Teacher, create_teacher, teacher_name
from timm_sscl.training.teacher_folder import teacher_folder
from timm_sscl.training.teacher_weights import teacher_options

DIFFERENCES = (Path(__file__).resolve().parents[2] / 'docs' / 'pages' / 'differences.md').read_text()
IN_DIFFERENCES = set(re.findall(r'--[a-z][a-z_-]*[a-z]', DIFFERENCES))
ALL = {name: default for options in TIMM_OPTIONS.values() for name, default in options.items()}
CHANGE_NOTHING = {'--no-prefetcher', '--local_rank'}  # accepted, and the page says why
OBSERVED = {}


def observes(*options):
    """The decorated test is the observable of these options of timm's."""
    def register(test):
        for option in options:
            assert option in ALL, f'timm has no {option}'
            OBSERVED[option] = test.__name__
        return test
    return register


def dest(option):
    return option[2:].replace('-', '_')


# ---- the list

def test_every_option_has_an_observable_or_a_reason_on_the_page():
    refused = {option for option in ALL if dest(option) in UNSUPPORTED}
    unexplained = set(ALL) - set(OBSERVED) - (IN_DIFFERENCES & (refused | CHANGE_NOTHING))
    assert not unexplained
    assert not refused & set(OBSERVED) and not CHANGE_NOTHING & set(OBSERVED)
    assert {'--' + name.replace('_', '-') for name in UNSUPPORTED} <= set(ALL)


@pytest.mark.parametrize('option', [option for option in ALL if dest(option) in UNSUPPORTED])
def test_refused_options_say_why(option):
    with pytest.raises(OptionError, match=f'{option} is not supported: .{{10,}}'):
        parse([option, '1'])


def test_defaults_are_timms():
    parser = create_parser()
    defaults = {name: action.default for action in parser._actions for name in action.option_strings}
    differ = {option for option, default in ALL.items()
              if dest(option) not in UNSUPPORTED and defaults[option] != default}
    assert differ == {'--model', '--device'} and differ <= IN_DIFFERENCES


def test_help_has_timms_groups_in_timms_order():
    parser = create_parser()
    groups = {group.title: {name for action in group._group_actions for name in action.option_strings}
              for group in parser._action_groups}
    timms = [title for title in TIMM_OPTIONS if title != 'options']  # where argparse puts what has no group
    assert [title for title in groups if title in timms] == timms
    for title, options in TIMM_OPTIONS.items():
        shown = groups[title if title in timms else 'Teacher and distillation parameters']
        assert {option for option in options if dest(option) not in UNSUPPORTED} <= shown, title
    text = parser.format_help()
    assert all((option in text) == (dest(option) not in UNSUPPORTED and option != '--local_rank') for option in ALL)


# ---- what the observables are run on

BASE = ['--dataset', 'digits', '--model', 'test_resnet', '--distill', 'none', '--num-classes', '10', '--img-size', '8',
        '--mean', '0.5', '--std', '0.5', '--crop-pct', '1', '--batch-size', '4', '--train-num-samples', '8',
        '--val-num-samples', '8', '--workers', '0', '--device', 'cpu', '--epochs', '2', '--warmup-epochs', '0']


def parse(argv):
    return parse_args([*BASE, *map(str, argv)])[0]


class Tiny(nn.Module):
    """The least that trains: a batch norm and a linear classifier of (B, 3, 8, 8)."""
    pretrained_cfg = dict(mean=(.5,) * 3, std=(.5,) * 3)
    num_classes, in_chans = 10, 3

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.norm = nn.BatchNorm2d(3)
            self.fc = nn.Linear(192, 10)

    def forward(self, x):
        return self.fc(self.norm(x).flatten(1))


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)  # Accelerate's settings are the process's


@pytest.fixture(scope='module')
def digits():
    """The digits are the same in most cases here: read once."""
    args = parse([])
    return create_datasets(args)


def loaders_of(args, datasets, model=None):
    config = args.data_config = resolve_input(args, model or Tiny())
    guarded = guard_samples(args, copy.deepcopy(datasets), config, 10)
    return config, partial(create_loaders, args, guarded, config, 10)


@pytest.fixture
def fit(tmp_path, digits):
    """fit(argv) is the training of a tiny model on eight digits, ready to run; the folder is fit.folder."""
    def make(argv=(), model=None, datasets=None, options=lambda args: args, resume=''):
        AcceleratorState._reset_state(reset_partial_state=True)
        args = parse(argv)
        accelerator = create_accelerator(args)
        model = Tiny() if model is None else model
        config, make_loaders = loaders_of(args, datasets or digits, model)
        session = Session(args, accelerator, make_loaders, SimpleNamespace(signal_number=None))
        mixes = make_loaders().mixup is not None
        task = create_task(args, model, None, TeacherInput(), config, torch.device('cpu'), mixes)
        folder = tmp_path / f'run{len(list(tmp_path.glob("run*")))}'
        folder.mkdir()
        return start_training(session, options(args), task, folder, 'student', resume=str(resume), ema=args.model_ema,
                              compile_task=bool(args.torchcompile))
    return make


def rows(fit):
    with open(fit.folder / 'summary.csv') as file:
        return list(csv.DictReader(file))


def student(argv):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create_student(parse(argv), 10)


# ---- data

@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """An image folder of three classes in colour, (40, 48) pixels."""
    root, rng = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    for split, count in (('train', 4), ('validation', 2), ('other', 3)):
        for name in ('ant', 'bee', 'cat'):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                colours = np.kron(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
                Image.fromarray(colours).save(root / split / name / f'{i}.png')
    return root


def folder_args(images, argv=()):
    return parse(['--dataset', '', '--data-dir', images, '--num-classes', 3, '--img-size', 32,
                  '--train-num-samples', 12, *argv])


def samples_of(args, training, indices=(0, 5, 10)):
    datasets = create_datasets(args)
    loaders = loaders_of(args, datasets)[1]()
    dataset = (loaders.train if training else loaders.eval).dataset
    indices = indices if training else (0, 3, 5)
    return [dataset[i][0] for i in indices], [dataset.dataset.filename(i, absolute=True) for i in indices], indices


TRANSFORM = dict(scale=(.08, 1.), ratio=(3 / 4, 4 / 3), hflip=.5, color_jitter=.4, interpolation='random',
                 re_mode='pixel', mean=(.5,) * 3, std=(.5,) * 3)


@pytest.mark.parametrize('argv, base, kwargs', [
    (['--no-aug'], [], dict(no_aug=True, interpolation='bicubic')),
    (['--train-crop-mode', 'rkrc'], [], dict(train_crop_mode='rkrc')),
    (['--scale', '0.5', '0.6'], [], dict(scale=(.5, .6))),
    (['--ratio', '1', '1'], [], dict(ratio=(1., 1.))),
    (['--hflip', '1'], [], dict(hflip=1.)),
    (['--vflip', '1'], [], dict(vflip=1.)),
    (['--color-jitter', '0.9'], [], dict(color_jitter=.9)),
    (['--color-jitter-prob', '0'], [], dict(color_jitter_prob=0.)),
    (['--grayscale-prob', '1'], [], dict(grayscale_prob=1.)),
    (['--gaussian-blur-prob', '1'], [], dict(gaussian_blur_prob=1.)),
    (['--aa', 'rand-m9-mstd0.5'], [], dict(auto_augment='rand-m9-mstd0.5')),
    (['--reprob', '1'], [], dict(re_prob=1.)),
    (['--remode', 'const'], ['--reprob', '1'], dict(re_prob=1., re_mode='const')),
    (['--recount', '3'], ['--reprob', '1'], dict(re_prob=1., re_count=3)),
    (['--train-interpolation', 'nearest'], [], dict(interpolation='nearest')),
    (['--mean', '0.1'], [], dict(mean=(.1,) * 3)),
    (['--std', '0.2', '0.3', '0.4'], [], dict(std=(.2, .3, .4))),
], ids=lambda x: x[0] if isinstance(x, list) and x else '')
@observes('--no-aug', '--train-crop-mode', '--scale', '--ratio', '--hflip', '--vflip', '--color-jitter',
          '--color-jitter-prob', '--grayscale-prob', '--gaussian-blur-prob', '--aa', '--reprob', '--remode',
          '--recount', '--train-interpolation', '--mean', '--std')
def test_training_images_are_those_of_timms_transform(argv, base, kwargs, images):
    found, files, indices = samples_of(folder_args(images, [*base, *argv]), training=True)
    without = samples_of(folder_args(images, base), training=True)[0]
    transform = create_transform((3, 32, 32), is_training=True, **{**TRANSFORM, **kwargs})
    for image, file, index in zip(found, files, indices):
        with seeded((42, 0, index)):
            assert torch.equal(image, transform(Image.open(file).convert('RGB')))
    assert not all(torch.equal(a, b) for a, b in zip(found, without))


@pytest.mark.parametrize('argv, size, kwargs', [
    (['--crop-pct', '0.5'], (3, 32, 32), dict(crop_pct=.5)),
    (['--interpolation', 'nearest'], (3, 32, 32), dict(interpolation='nearest')),
    (['--img-size', '16'], (3, 16, 16), {}),
    (['--input-size', '3', '16', '24'], (3, 16, 24), {}),
    (['--mean', '0.1', '0.2', '0.3'], (3, 32, 32), dict(mean=(.1, .2, .3))),
    (['--std', '0.2'], (3, 32, 32), dict(std=(.2,) * 3)),
], ids=lambda x: x[0] if isinstance(x, list) else '')
@observes('--crop-pct', '--interpolation', '--img-size', '--input-size')
def test_validation_images_are_those_of_timms_transform(argv, size, kwargs, images):
    found, files, _ = samples_of(folder_args(images, argv), training=False)
    without = samples_of(folder_args(images), training=False)[0]
    given = dict(interpolation='bicubic', mean=(.5,) * 3, std=(.5,) * 3, crop_pct=1.)
    transform = create_transform(size, is_training=False, **{**given, **kwargs})
    for image, file, other in zip(found, files, without):
        assert torch.equal(image, transform(Image.open(file).convert('RGB'))) and not torch.equal(image, other)


@pytest.mark.parametrize('argv, key, training, validation', [
    (['--dataset', 'hfds/some'], 'name', 'hfds/some', 'hfds/some'),
    (['--data-dir', 'here'], 'root', 'here', 'here'),
    (['--train-split', 'all'], 'split', 'all', 'validation'),
    (['--val-split', 'test'], 'split', 'train', 'test'),
    (['--train-num-samples', '5'], 'num_samples', 5, 8),
    (['--val-num-samples', '6'], 'num_samples', 8, 6),
    (['--dataset-download'], 'download', True, True),
    (['--class-map', 'map.txt'], 'class_map', 'map.txt', 'map.txt'),
    (['--input-img-mode', 'L'], 'input_img_mode', 'L', 'L'),
    (['--input-key', 'png'], 'input_key', 'png', 'png'),
    (['--target-key', 'label'], 'target_key', 'label', 'label'),
    (['--dataset-trust-remote-code'], 'trust_remote_code', True, True),
    (['--epoch-repeats', '2'], 'repeats', 2., None),
    (['--seed', '7'], 'seed', 7, 7),
    (['--batch-size', '2'], 'batch_size', 2, 2),
], ids=lambda x: x[0] if isinstance(x, list) else '')
@observes('--dataset', '--data-dir', '--train-split', '--val-split', '--train-num-samples', '--val-num-samples',
          '--dataset-download', '--class-map', '--input-img-mode', '--input-key', '--target-key',
          '--dataset-trust-remote-code', '--epoch-repeats')
def test_data_set_is_asked_of_timm(argv, key, training, validation, monkeypatch):
    def asked(argv):
        calls = []
        monkeypatch.setattr(
            factory, 'create_timm_dataset', lambda name, **kw: calls.append({'name': name, **kw}) or [0])
        create_datasets(parse(['--dataset', 'tfds/other', *argv]))
        return [next(call for call in calls if call['is_training'] is t).get(key) for t in (True, False)]
    assert asked(argv) == [training, validation] != asked([])


def test_data_options_reach_the_samples(images, tmp_path):
    plain = create_datasets(folder_args(images))
    (tmp_path / 'map.txt').write_text('cat\nbee\nant\n')
    turned = create_datasets(folder_args(images, ['--class-map', tmp_path / 'map.txt', '--train-split', 'other']))
    assert [len(d) for d in (*plain, *turned)] == [12, 6, 9, 6]
    assert [plain[1][i][1] for i in range(6)] == [2 - turned[1][i][1] for i in range(6)]
    assert plain[0][0][0].mode == 'RGB'
    for argv in (['--input-img-mode', 'L'], ['--in-chans', 1], ['--input-size', 1, 8, 8]):
        assert create_datasets(folder_args(images, argv))[0][0][0].mode == 'L'
        assert create_datasets(parse(argv))[0][0][0].mode == 'L'  # the digits as well
    assert [len(d) for d in create_datasets(parse(['--train-num-samples', 7, '--val-num-samples', 3]))] == [7, 3]
    with pytest.raises(OptionError, match="--val-split '': every run is validated"):
        parse(['--val-split', ''])


@observes('--num-classes')
def test_number_of_classes(images):
    dataset = create_datasets(folder_args(images))[0]
    assert resolve_num_classes(folder_args(images, ['--num-classes', 5]), dataset) == 5
    assert resolve_num_classes(folder_args(images), dataset) == 3
    with pytest.raises(OptionError, match='--num-classes 2: the data set has 3 classes'):
        resolve_num_classes(folder_args(images, ['--num-classes', 2]), dataset)


@observes('--batch-size', '--validation-batch-size', '--workers', '--pin-mem')
def test_loaders(digits):
    def settings(*argv):
        loaders = loaders_of(parse(argv), digits)[1]()
        return [(x.batch_size, x.num_workers, x.pin_memory) for x in loaders[:2]]
    assert settings() == [(4, 0, False)] * 2
    assert settings('--batch-size', 2) == [(2, 0, False)] * 2
    assert settings('--validation-batch-size', 3) == [(4, 0, False), (3, 0, False)]
    assert settings('--workers', 2) == [(4, 2, False)] * 2
    assert settings('--pin-mem') == [(4, 0, True)] * 2


@observes('--worker-seeding')
def test_workers_seed_numpy_too_unless_told_not_to(digits, monkeypatch):
    monkeypatch.setattr(torch.utils.data, 'get_worker_info', lambda: SimpleNamespace(id=0, seed=5))
    drawn = []
    for seeding in ('all', 'part'):
        loader = loaders_of(parse(['--worker-seeding', seeding]), digits)[1]().train
        np.random.seed(1)
        loader.worker_init_fn(0)
        drawn.append(np.random.rand())
    first = [np.random.RandomState(seed).rand() for seed in (5, 1)]
    assert drawn == first


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


class Posing:
    """An accelerator that says of itself what it is told to: its device is a GPU, or there are other processes."""

    def __init__(self, accelerator, **said):
        self._accelerator, self._said = accelerator, said

    def __getattr__(self, name):
        return self._said[name] if name in self._said else getattr(self._accelerator, name)


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


# ---- optimizer

@observes('--opt', '--opt-eps', '--opt-betas', '--momentum', '--weight-decay', '--opt-kwargs')
def test_optimizer(fit):
    def group(*argv):
        optimizer = fit(argv).optimizer.optimizer
        decays = {g['weight_decay'] for g in optimizer.param_groups}
        return type(optimizer), {**optimizer.param_groups[0], 'decays': decays}
    kind, plain = group()
    assert kind is torch.optim.SGD and (plain['momentum'], plain['nesterov'], plain['decays']) == (.9, True, {0., 2e-5})
    assert group('--momentum', .5)[1]['momentum'] == .5
    assert group('--weight-decay', .3)[1]['decays'] == {0., .3}  # none for biases and norms
    assert group('--opt-kwargs', 'nesterov=False')[1]['nesterov'] is False
    kind, adamw = group('--opt', 'adamw')
    assert kind is torch.optim.AdamW and (adamw['eps'], tuple(adamw['betas'])) == (1e-8, (.9, .999))
    adamw = group('--opt', 'adamw', '--opt-eps', 1e-3, '--opt-betas', .8, .9)[1]
    assert (adamw['eps'], tuple(adamw['betas'])) == (1e-3, (.8, .9))


@observes('--layer-decay', '--layer-decay-min-scale', '--layer-decay-no-opt-scale')
def test_layer_decay(fit):
    def scales(*argv):
        run = fit(['--img-size', 32, *argv], timm.create_model('test_resnet', num_classes=10))
        names = {id(p): n for n, p in run.task.student.named_parameters()}
        return {names[id(p)]: g.get('lr_scale', 1.) for g in run.optimizer.param_groups for p in g['params']}
    assert set(scales().values()) == {1.}
    layers = ['conv1.0.weight', 'layer1.0.conv1.weight', 'layer2.0.conv1.weight', 'layer3.0.conv1.weight',
              'layer4.0.conv1.weight', 'fc.weight']
    found = scales('--layer-decay', .5)
    assert [found[name] for name in layers] == [.5 ** 5, .5 ** 4, .5 ** 3, .5 ** 2, .5, 1.]
    found = scales('--layer-decay', .5, '--layer-decay-min-scale', .2)
    assert [found[name] for name in layers] == [.2, .2, .2, .25, .5, 1.]
    found = scales('--layer-decay', .5, '--layer-decay-no-opt-scale', .2)
    assert [name in found for name in layers] == [False, False, False, True, True, True]


def gradients(run):
    """What the optimizer is given at the first step, by name."""
    found = {}
    run.optimizer.step = lambda: found.update({n: p.grad.clone() for n, p in run.task.student.named_parameters()})
    run.task.train()
    train.train_step(run, 0, next(iter(run.train_loader)))
    return found


@observes('--clip-grad', '--clip-mode')
def test_gradients_are_clipped(fit):
    plain = gradients(fit())
    norm = torch.cat([g.flatten() for g in plain.values()]).norm()
    assert norm > 0.1
    for name, grad in gradients(fit(['--clip-grad', .1])).items():
        assert torch.allclose(grad, plain[name] * .1 / norm, rtol=1e-5)  # torch adds 1e-6 to the norm
    for name, grad in gradients(fit(['--clip-grad', .01, '--clip-mode', 'value'])).items():
        assert torch.equal(grad, plain[name].clamp(-.01, .01))
    clipped, weights = gradients(fit(['--clip-grad', 1e-3, '--clip-mode', 'agc'])), dict(Tiny().named_parameters())
    for name in ('norm.weight', 'norm.bias'):  # Brock et al. 2021, Eq. 3, a vector as one unit
        most = 1e-3 * weights[name].norm().clamp(min=1e-3)
        assert torch.allclose(clipped[name], plain[name] * (most / plain[name].norm()).clamp(max=1.), rtol=1e-5)
    assert torch.equal(clipped['fc.weight'], plain['fc.weight'])  # the head is left alone
    assert not torch.equal(clipped['norm.weight'], plain['norm.weight'])


@observes('--grad-accum-steps')
def test_accumulated_steps_are_those_of_their_mean_loss(fit, monkeypatch):
    train_step = train.train_step
    datasets = create_datasets(parse(['--train-num-samples', 20]))
    argv = ['--epochs', 1, '--lr', .1, '--opt', 'momentum', '--momentum', 0, '--weight-decay', 0, '--smoothing', 0]
    for accumulated, groups in ((1, [[0], [1], [2], [3], [4]]), (2, [[0, 1], [2, 3], [4]]), (3, [[0, 1, 2], [3, 4]])):
        run, batches = fit([*argv, '--grad-accum-steps', accumulated], datasets=datasets), []
        monkeypatch.setattr(train, 'train_step', lambda training, step, batch: (
            batches.append((batch[0].clone(), batch[1])) or train_step(training, step, batch)))
        train.fit(run)
        model = Tiny()
        optimizer = torch.optim.SGD(model.parameters(), lr=.1)
        for group in groups:
            optimizer.zero_grad()
            for i in group:
                (F.cross_entropy(model(batches[i][0]), batches[i][1]) / len(group)).backward()
            optimizer.step()
        assert run.num_updates == len(groups)
        for a, b in zip(run.task.student.parameters(), model.parameters()):
            assert torch.allclose(a, b, atol=1e-6)  # float32, sums in another order


# ---- schedule

def _cosine(optimizer, t_initial=6, **kwargs):
    given = dict(lr_min=0., cycle_decay=.5, warmup_lr_init=1e-5)
    return CosineLRScheduler(optimizer, t_initial, **{**given, **kwargs})


def _step(optimizer, decay_t=2., decay_rate=.1, **kwargs):
    return StepLRScheduler(optimizer, decay_t, decay_rate, warmup_lr_init=1e-5, warmup_prefix=False, **kwargs)


NOISE = ['--lr-noise', '0.2', '0.9']
STEP = ['--sched', 'step', '--decay-epochs', '2']
PLATEAU = ['--sched', 'plateau', '--patience-epochs', '1']


@pytest.mark.parametrize('argv, base, epochs, scheduler', [
    (['--sched', 'tanh'], [], 6, lambda o: TanhLRScheduler(o, 6, cycle_decay=.5)),
    (['--sched', 'poly', '--decay-rate', '2'], [], 6, lambda o: PolyLRScheduler(o, 6, power=2., cycle_decay=.5)),
    (['--sched', 'none'], [], 6, None),
    (['--epochs', '3'], [], 3, partial(_cosine, t_initial=3)),
    (['--lr', '0.3'], [], 6, _cosine),
    (['--min-lr', '0.01'], [], 6, partial(_cosine, lr_min=.01)),
    (['--lr-k-decay', '2'], [], 6, partial(_cosine, k_decay=2.)),
    (['--lr-cycle-limit', '2'], ['--epochs', '3'], 6, partial(_cosine, t_initial=3, cycle_limit=2)),
    (['--lr-cycle-mul', '2'], ['--epochs', '2', '--lr-cycle-limit', '2'], 6,
     partial(_cosine, t_initial=2, cycle_limit=2, cycle_mul=2.)),
    (['--lr-cycle-decay', '0.1'], ['--epochs', '3', '--lr-cycle-limit', '2'], 6,
     partial(_cosine, t_initial=3, cycle_limit=2, cycle_decay=.1)),
    (['--warmup-epochs', '2'], [], 6, partial(_cosine, warmup_t=2)),
    (['--warmup-lr', '0.05'], ['--warmup-epochs', '2'], 6, partial(_cosine, warmup_t=2, warmup_lr_init=.05)),
    (['--warmup-prefix'], ['--warmup-epochs', '2'], 8, partial(_cosine, warmup_t=2, warmup_prefix=True)),
    (['--cooldown-epochs', '2'], [], 8, _cosine),
    (NOISE, [], 6, partial(_cosine, noise_range_t=[1.2, 5.4])),
    (['--lr-noise-pct', '0.1'], NOISE, 6, partial(_cosine, noise_range_t=[1.2, 5.4], noise_pct=.1)),
    (['--lr-noise-std', '0.2'], NOISE, 6, partial(_cosine, noise_range_t=[1.2, 5.4], noise_std=.2)),
    (['--decay-epochs', '3'], STEP, 6, partial(_step, decay_t=3.)),
    (['--decay-rate', '0.5'], STEP, 6, partial(_step, decay_rate=.5)),
    (['--decay-milestones', '1', '4'], ['--sched', 'multistep'], 6,
     lambda o: MultiStepLRScheduler(o, [1, 4], .1, warmup_prefix=False)),
    (['--patience-epochs', '2'], PLATEAU, 6, lambda o: PlateauLRScheduler(o, .1, patience_t=2)),
    (['--sched-on-updates'], [], 6, partial(_cosine, t_initial=12, t_in_epochs=False)),
], ids=lambda x: ' '.join(x) if isinstance(x, list) else '')
@observes('--sched', '--epochs', '--lr', '--min-lr', '--lr-k-decay', '--lr-cycle-limit', '--lr-cycle-mul',
          '--lr-cycle-decay', '--warmup-epochs', '--warmup-lr', '--warmup-prefix', '--cooldown-epochs', '--lr-noise',
          '--lr-noise-pct', '--lr-noise-std', '--decay-epochs', '--decay-rate', '--decay-milestones',
          '--patience-epochs', '--sched-on-updates')
def test_learning_rates_are_those_of_timms_scheduler(argv, base, epochs, scheduler, fit, monkeypatch):
    monkeypatch.setattr(validation, 'evaluate', lambda *args: dict(loss=1., top1=50., top5=60.))

    def rates(argv):
        run = fit(['--lr', .1, '--epochs', 6, *argv])
        monkeypatch.setattr(train, 'train_step', lambda training, step, batch: _update_only(training)[1])
        train.fit(run)
        return [float(row['lr']) for row in rows(run)]

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=.3 if '--lr' in argv else .1)
    by_hand, expected = scheduler(optimizer) if scheduler else None, []
    for epoch in range(epochs):
        for update in range(2):
            if by_hand:
                by_hand.step_update(2 * epoch + update + 1)
        expected.append(optimizer.param_groups[0]['lr'])
        if by_hand:
            by_hand.step(epoch + 1, 50.)
    found = rates([*base, *argv])
    assert found == pytest.approx(expected, rel=1e-12)  # the same formulas in float64
    assert found != rates(base)


def _update_only(run):
    """A step that trains nothing but counts."""
    run.num_updates += 1
    if run.scheduler is not None:
        run.scheduler.step_update(num_updates=run.num_updates, metric=None)
    return 4, False


@observes('--lr-base', '--lr-base-size', '--lr-base-scale')
def test_learning_rate_follows_the_global_batch():
    def lr(*argv, processes=2):
        return resolve_lr(parse(['--batch-size', 32, '--grad-accum-steps', 2, *argv]), processes)
    assert lr() == pytest.approx(.1 * 128 / 256)
    assert lr('--lr-base', .5) == pytest.approx(.5 * 128 / 256)
    assert lr('--lr-base-size', 512) == pytest.approx(.1 * 128 / 512)
    assert lr('--lr-base-scale', 'sqrt') == lr('--opt', 'adamw') == lr('--opt', 'lamb') == pytest.approx(.1 * .5 ** .5)
    assert lr('--opt', 'adamw', '--lr-base-scale', 'linear') == pytest.approx(.1 * .5)
    assert lr('--lr', .7) == .7


# ---- loss, mixup, distillation

def criterion_of(argv):
    return task_of(parse(argv), Tiny()).criterion


def task_of(args, model, teacher=None):
    config = dict(input_size=(3, 8, 8))
    return create_task(args, model, teacher, TeacherInput(), config, torch.device('cpu'), args.mixup > 0)


def _bce(logits, target, reduce=torch.mean, weight=1.):
    p = torch.sigmoid(logits.double())
    terms = -(weight * target * p.log() + (1 - target) * (1 - p).log())
    return reduce(terms) if reduce is torch.mean else terms.sum(-1).mean()


@pytest.mark.parametrize('argv, loss', [
    (['--smoothing', '0'], lambda z, y: F.nll_loss(z.double().log_softmax(-1), y)),
    (['--smoothing', '0.3'], lambda z, y: -((F.one_hot(y, 10) * .7 + .03) * z.double().log_softmax(-1)).sum(-1).mean()),
    (['--bce-loss'], lambda z, y: _bce(z, F.one_hot(y, 10) * .9 + .01)),
    (['--bce-loss', '--bce-sum'], lambda z, y: _bce(z, F.one_hot(y, 10) * .9 + .01, reduce=None)),
    (['--bce-loss', '--bce-pos-weight', '3'], lambda z, y: _bce(z, F.one_hot(y, 10) * .9 + .01, weight=3.)),
    (['--bce-loss', '--bce-target-thresh', '0.2'], lambda z, y: _bce(z, F.one_hot(y, 10).double())),
    (['--mixup', '1'], lambda z, y: -(F.one_hot(y, 10) * z.double().log_softmax(-1)).sum(-1).mean()),
], ids=lambda x: ' '.join(x) if isinstance(x, list) else '')
@observes('--smoothing', '--bce-loss', '--bce-sum', '--bce-pos-weight', '--bce-target-thresh')
def test_classification_loss(argv, loss):
    logits, labels = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    target = F.one_hot(labels, 10).float() if '--mixup' in argv else labels
    found = criterion_of(argv)(logits, target)
    assert found.item() == pytest.approx(loss(logits, labels).item(), rel=1e-5)  # float32 against float64
    others = [criterion_of(a)(logits, labels).item() for a in ([], ['--bce-loss']) if a != argv]
    assert all(abs(found.item() - other) > 1e-4 for other in others)


def mixed(argv, digits):
    """A batch of four constant images before and after, with its targets."""
    mixup = loaders_of(parse(argv), digits)[1]().mixup
    x = torch.arange(1., 5.)[:, None, None, None].expand(4, 3, 8, 8).clone()
    np.random.seed(3)
    return x.clone(), *mixup(x, torch.arange(4))


@observes('--mixup', '--cutmix', '--cutmix-minmax', '--mixup-prob', '--mixup-switch-prob', '--mixup-mode')
def test_mixup_and_cutmix(digits):
    assert loaders_of(parse([]), digits)[1]().mixup is None
    smoothed = .9 * torch.eye(4, 10) + .01

    x, mix, target = mixed(['--mixup', 1], digits)
    lam = (target[0, 0] - .01) / .9
    assert 0 < lam < 1 and torch.allclose(target, lam * smoothed + (1 - lam) * smoothed.flip(0), atol=1e-6)
    assert torch.allclose(mix, lam * x + (1 - lam) * x.flip(0), atol=1e-5)

    for argv in (['--cutmix', 1], ['--cutmix', 1, '--mixup', 1, '--mixup-switch-prob', 1]):
        x, mix, target = mixed(argv, digits)
        kept = (mix == x).float().mean()
        assert ((mix == x) | (mix == x.flip(0))).all() and 0 < kept < 1
        assert torch.allclose(target, kept * smoothed + (1 - kept) * smoothed.flip(0), atol=1e-6)
    x, mix, _ = mixed(['--cutmix', 1, '--mixup', 1, '--mixup-switch-prob', 0], digits)
    assert not ((mix == x) | (mix == x.flip(0))).all()  # mixup

    x, mix, _ = mixed(['--cutmix-minmax', .5, .7], digits)  # a box of 4 x 4 in 8 x 8
    assert (mix != x).float().mean() == .25
    x, mix, target = mixed(['--mixup', 1, '--mixup-prob', 0], digits)
    assert torch.equal(mix, x) and torch.allclose(target, smoothed)
    shares = mixed(['--mixup', 1, '--mixup-mode', 'elem'], digits)[2].max(-1).values
    assert len(set(mixed(['--mixup', 1], digits)[2].max(-1).values.tolist())) == 1 < len(set(shares.tolist()))


@observes('--mixup-off-epoch')
def test_mixup_ends_at_its_epoch(fit, monkeypatch):
    for argv, expected in (([], [True] * 3), (['--mixup-off-epoch', 2], [True, True, False])):
        run, seen = fit(['--mixup', 1, '--epochs', 3, *argv]), []
        monkeypatch.setattr(train, 'train_step', lambda training, *_: seen.append(training.mixup.mixup_enabled))
        train.fit(run)
        assert seen[::2] == expected


@pytest.mark.parametrize('argv', [
    [], ['--kd-temperature', '2'], ['--distill-loss-weight', '3'], ['--task-loss-weight', '0.3'],
    ['--distill-loss-weight', '3', '--task-loss-weight', '0.3'], ['--kd-loss-type', 'kl', '--kd-distill-type', 'logit'],
], ids=' '.join)
@observes('--kd-model-name', '--kd-temperature', '--distill-loss-weight', '--task-loss-weight', '--kd-loss-type',
          '--kd-distill-type')
def test_kd_options_are_timms_logit_distillation(argv):
    args = parse_args([*BASE[:4], '--num-classes', '10', '--kd-model-name', 'test_vit', *argv])[0]
    assert teacher_name(args) == 'test_vit' and list(args.losses) == ['kd']
    model, teacher = Tiny(0), Tiny(1)
    task = task_of(args, model, teacher)
    given = {a[2:].replace('-', '_'): float(v) for a, v in zip(argv[::2], argv[1::2]) if 'type' not in a}
    timms = LogitDistillationTask(
        copy.deepcopy(model), teacher, criterion_kwargs=dict(smoothing=.1), temperature=given.pop('kd_temperature', 4.),
        verbose=False, **given)
    x, y = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    assert task(x, y)['loss'].item() == pytest.approx(timms.train()(x, y)['loss'].item(), rel=1e-5)  # float32
    for refused in (['--kd-distill-type', 'feature'], ['--kd-loss-type', 'mse']):
        with pytest.raises(OptionError, match=refused[1]):
            parse(refused)


# ---- weights' moving average

@observes('--model-ema', '--model-ema-decay', '--model-ema-warmup', '--model-ema-force-cpu')
def test_model_ema(fit, monkeypatch):
    def averaged(*argv):
        run, weights = fit(['--model-ema', '--model-ema-decay', .7, '--lr', .1, *argv]), []
        update = run.task.update_ema
        run.task.update_ema = lambda step: weights.append(run.task.student.fc.weight.detach().clone()) or update(step)
        train.fit(run)
        return run, weights, run.task.get_eval_model(ema=True).fc.weight
    for argv, decays in (((), [0., .7, .7, .7]), (('--model-ema-decay', .2), [0., .2, .2, .2]),
                         (('--model-ema-warmup',), [0., *(min(.7, 1 - (1 + n) ** (-2 / 3)) for n in (1, 2, 3))])):
        run, weights, found = averaged(*argv)
        expected = torch.zeros(10, 192)
        for decay, weight in zip(decays, weights):
            expected = decay * expected + (1 - decay) * weight
        assert len(weights) == 4 and torch.allclose(found, expected, atol=1e-6)  # float32
        assert 'eval_top1_ema' in rows(run)[0] and not torch.equal(found, weights[-1])
    run, _, _ = averaged('--model-ema-force-cpu')
    assert 'eval_top1_ema' not in rows(run)[0]  # as in timm, which keeps it off the device and unvalidated
    devices = []
    setup = TrainingTask.setup_ema
    monkeypatch.setattr(
        TrainingTask, 'setup_ema', lambda task, device, **kw: devices.append(device) or setup(task, **kw))
    for argv in ([], ['--model-ema-force-cpu']):
        fit(['--model-ema', *argv])
    assert devices == [None, torch.device('cpu')]
    assert not fit([]).task.has_ema()


# ---- the run

@observes('--log-interval', '--save-images')
def test_logging(fit, caplog):
    caplog.set_level(logging.INFO, 'train')
    datasets = create_datasets(parse(['--train-num-samples', 20]))
    for interval, logged in ((1, 5), (2, 3), (50, 1)):  # the last step always
        caplog.clear()
        run = fit(['--epochs', 1, '--log-interval', interval, '--save-images'], datasets=datasets)
        train.fit(run)
        assert sum('img/s' in message for message in caplog.messages) == logged
        assert len(list(run.folder.glob('train-batch-*.jpg'))) == logged
    run = fit(['--epochs', 1])
    train.fit(run)
    assert not list(run.folder.glob('*.jpg'))


@observes('--val-interval')
def test_validation_interval(fit, monkeypatch):
    for interval, validated in ((1, [1, 1, 1, 1, 1]), (2, [0, 1, 0, 1, 1]), (3, [0, 0, 1, 0, 1])):  # the last always
        calls = []
        monkeypatch.setattr(validation, 'evaluate', lambda *args: calls.append(1) or dict(loss=1., top1=50., top5=60.))
        run = fit(['--epochs', 5, '--val-interval', interval])
        train.fit(run)
        assert [bool(row['eval_top1']) for row in rows(run)] == validated and len(calls) == sum(validated)


@observes('--checkpoint-hist', '--eval-metric')
def test_the_best_checkpoints_are_kept(fit, monkeypatch):
    def best(*argv):
        metrics = iter(zip([1., 9., 5., 7.], [4., 3., 1., 2.]))  # top-1 and loss per epoch

        def evaluate(*args):
            top1, loss = next(metrics)
            return dict(loss=loss, top1=top1, top5=-top1)
        monkeypatch.setattr(validation, 'evaluate', evaluate)
        run = fit(['--epochs', 4, *argv])
        result = train.fit(run)
        kept = sorted(int(re.search(r'checkpoint-(\d)', f.name)[1]) for f in run.folder.glob('checkpoint-*'))
        file = torch.load(run.folder / 'model_best.pth.tar')
        assert file['epoch'] == result.best_epoch
        return result.best_epoch, kept
    assert best() == (1, [0, 1, 2, 3])
    assert best('--checkpoint-hist', 2) == (1, [1, 3])
    assert best('--checkpoint-hist', 2, '--eval-metric', 'loss') == (2, [2, 3])
    assert best('--checkpoint-hist', 1, '--eval-metric', 'top5') == (0, [0])


def test_the_averages_metric_ranks_where_there_is_one(fit, monkeypatch):
    values = iter([1., 8., 2., 3.])  # model and average, two epochs
    monkeypatch.setattr(validation, 'evaluate', lambda *args: dict(loss=1., top1=next(values), top5=1.))
    result = train.fit(fit(['--model-ema']))
    assert (result.best, result.best_epoch) == (8., 0)


@observes('--recovery-interval')
def test_recovery_interval(fit):
    datasets = create_datasets(parse(['--train-num-samples', 20]))
    for interval, steps in ((0, []), (1, [1, 2, 3, 4, 5]), (2, [2, 4])):
        run, saved = fit(['--epochs', 1, '--recovery-interval', interval], datasets=datasets), []
        run.saver.save_recovery = lambda position, state: saved.append(position.step)
        train.fit(run)
        assert saved[:-1] == steps  # and one more before the validation


@observes('--start-epoch', '--resume', '--no-resume-opt')
def test_where_a_run_goes_on(fit):
    first = fit(['--epochs', 2, '--lr', .1])
    train.fit(first)
    file = first.folder / 'last.pth.tar'
    config = dict(input_size=(3, 8, 8))
    assert find_run(parse(['--resume', file]), first.folder.parent, config)[1] == str(file)
    assert find_run(parse([]), first.folder.parent, config)[1] == ''
    for argv, epoch, momentum in (([], 2, True), (['--no-resume-opt'], 2, False), (['--start-epoch', 1], 1, True)):
        run = fit(['--epochs', 4, '--lr', .1, *argv], Tiny(5), resume=file)
        assert run.position == (epoch, 0)
        assert torch.equal(run.task.student.fc.weight, first.task.student.fc.weight)
        assert bool(run.optimizer.optimizer.state) is momentum
        train.fit(run)
        assert [int(row['epoch']) for row in rows(run)] == list(range(epoch, 4))
        loaded = []
        run.session.accelerator = Posing(run.accelerator, scaler=SimpleNamespace(load_state_dict=loaded.append))
        restore_run_state(run, dict(scaler=dict(scale=2.)))
        assert bool(loaded) is momentum
    run = fit(['--epochs', 4, '--start-epoch', 3])
    train.fit(run)
    assert [int(row['epoch']) for row in rows(run)] == [3]
    assert fit(['--epochs', 4, '--start-epoch', 3], options=teacher_options).position == (0, 0)  # a run of its own


@observes('--output', '--experiment')
def test_folder_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = dict(input_size=(3, 8, 8))
    folder, resume = find_run(parse(['--experiment', 'mine']), Path('out'), config)
    assert folder == Path('out/mine') and resume == ''
    assert re.fullmatch(r'out/\d{8}-\d{6}-test_resnet-8', str(find_run(parse([]), Path('out'), config)[0]))
    seen = []
    monkeypatch.setattr(train, 'find_run', lambda args, root, config: seen.append(root) or (root / 'run', ''))
    prepared(['--output', 'there'])
    prepared([])
    assert seen == [Path('there'), Path('output/train')] and (tmp_path / 'there/run/args.yaml').is_file()


def prepared(argv):
    AcceleratorState._reset_state(reset_partial_state=True)
    args = parse(argv)
    with ExitStack() as held:
        return train.prepare(args, create_accelerator(args), SimpleNamespace(signal_number=None), held)


@observes('--seed')
def test_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def drawn(seed, n):
        job = prepared(['--seed', seed, '--experiment', f'run{n}'])
        training = start_training(job.session, job.session.args, job.task, job.folder, 'student')
        order = torch.cat([y for _, y in training.train_loader])
        return job.student.conv1[0].weight.detach(), order, torch.rand(1)
    first, again, other = drawn(1, 0), drawn(1, 1), drawn(2, 2)
    assert all(map(torch.equal, first, again)) and not any(map(torch.equal, first, other))


def test_teachers_are_shared_only_where_every_setting_agrees(tmp_path):
    """Every option that the tests above observe in a training makes another teacher."""
    def folder(argv):
        args = parse(argv)
        args.data_config = resolve_input(args, Tiny())
        teacher = SimpleNamespace(_model_args={})
        return teacher_folder(Teacher(args, teacher, TeacherInput(), 10, tmp_path))
    groups = ('Optimizer parameters', 'Learning rate schedule parameters', 'Augmentation and regularization parameters')
    trained_by = [option for title in groups for option in TIMM_OPTIONS[title]
                  if dest(option) not in UNSUPPORTED and option not in ('--start-epoch', '--drop-connect')]
    for option in trained_by:
        default = ALL[option]
        value = {'--sched': ['step'], '--opt': ['adamw'], '--clip-mode': ['agc'], '--lr-base-scale': ['sqrt'],
                 '--aa': ['original'], '--remode': ['const'], '--mixup-mode': ['elem'], '--train-crop-mode': ['rkrc'],
                 '--train-interpolation': ['bilinear'], '--opt-kwargs': ['nesterov=False']}.get(option)
        value = value or ([] if default is False else [3, 4] if isinstance(default, list) else [3])
        assert folder([option, *value]) != folder([]), option
