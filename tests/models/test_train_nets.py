"""train.py's --stem-pool and --norm: which models they reach, and what a teacher's folder depends on."""
from pathlib import Path

import pytest
import torch.nn as nn

from timm_sscl.training.command_line.options import parse_args
from timm_sscl.conversion.model import SpikingModule
from timm_sscl.conversion.variants.stem_pool import has_average_stem_pool
from timm_sscl.conversion.variants.tdbn import TdBatchNorm
import timm
from timm_sscl.distillation.teacher_input import TeacherInput
from timm_sscl.training.loaders import create_loaders
from timm_sscl.training.student import create_student
from timm_sscl.training.teachers.teacher import Teacher, create_teacher
from timm_sscl.training.teachers.teacher_folder import teacher_folder

CONFIG = dict(input_size=(3, 64, 64), mean=(.5,) * 3, std=(.5,) * 3, interpolation='bicubic', crop_pct=1.)
DATA = ['--data-dir', 'somewhere', '--model', 'spiking_resnet18']


def _args(*argv):
    args = parse_args([*DATA, *argv])[0]
    args.data_config = CONFIG
    return args


def _teacher(args):
    return create_teacher(args, 5, CONFIG)[0]


def test_stem_pool_reaches_the_student_and_its_own_ann():
    args = _args('--stem-pool', 'avg', '-T', '2')
    student = create_student(args, 5)
    assert student.settings.stem_pool == 'avg' and has_average_stem_pool(student) and student.timesteps == 2
    assert has_average_stem_pool(_teacher(args))
    plain = _args()
    assert not has_average_stem_pool(create_student(plain, 5)) and not has_average_stem_pool(_teacher(plain))


def test_stem_pool_reaches_an_ann_that_is_the_student():
    student = create_student(_args('--stem-pool', 'avg', '--model', 'resnet18'), 5)
    assert has_average_stem_pool(student) and not isinstance(student, SpikingModule)


def test_stem_pool_leaves_other_teachers_and_timms_own_weights_alone(monkeypatch):
    assert not has_average_stem_pool(_teacher(_args('--stem-pool', 'avg', '--teacher', 'resnet34')))
    create = timm.create_model
    monkeypatch.setattr(timm, 'create_model', lambda **given: create(**{**given, 'pretrained': False}))
    assert not has_average_stem_pool(_teacher(_args('--stem-pool', 'avg', '--teacher-pretrained')))
    tuned = _args('--stem-pool', 'avg', '--teacher-pretrained', '--teacher-epochs', '3')
    assert has_average_stem_pool(_teacher(tuned))


def test_a_teachers_folder_depends_on_what_its_training_depends_on():
    def folder(*argv):
        args = _args(*argv)
        return teacher_folder(Teacher(args, _teacher(args), TeacherInput(), 5, Path('root')))

    plain = folder()
    others = [folder('--stem-pool', 'avg'), folder('--crop-padding', '4'), folder('--cutout', '16'),
              folder('--aa', 'cifar10')]
    assert len({plain, *others}) == 5
    assert folder('--norm', 'tdbn') == plain  # the teacher's norms are plain ones
    assert folder('--teacher', 'resnet34', '--stem-pool', 'avg') == folder('--teacher', 'resnet34')


def test_norm_makes_the_students_norms_tdbn():
    args = _args('--norm', 'tdbn', '--v-threshold', '0.8')
    student = create_student(args, 5)
    norms = [m for m in student.modules() if isinstance(m, nn.BatchNorm2d)]
    assert student.settings.norm == 'tdbn' and all(m.v_threshold == .8 for m in norms)
    assert not [m for m in _teacher(args).modules() if isinstance(m, TdBatchNorm)]


@pytest.mark.parametrize('argv, words', [
    (['--norm', 'tdbn', '--model', 'resnet18'], "--norm: 'resnet18' does not spike"),
    (['--norm', 'tdbn', '--sync-bn'], '--norm tdbn: --sync-bn would replace'),
    (['--norm', 'tdbn', '--model', 'spiking_test_vit'], "norm='tdbn': VisionTransformer has no batch norm"),
    (['--stem-pool', 'avg', '--model', 'spiking_test_vit'], "stem_pool='avg': VisionTransformer has no max pooling"),
    (['--stem-pool', 'avg', '--model', 'resnet20_cifar'], "stem_pool='avg': ResNetCifar has no max pooling"),
    (['--stem-pool', 'max'], "--stem-pool: invalid choice: 'max'"), (['--norm', 'bn'], '--norm bn: is not registered')])
def test_what_does_not_fit_is_refused_by_name(argv, words):
    with pytest.raises(ValueError) as error:
        create_student(_args(*argv), 5)
    assert words in str(error.value)


def test_augmentation_of_cifar_is_checked():
    args = _args('--cutout', '5', '--workers', '0', '--batch-size', '4')
    datasets = [type('Images', (list,), dict(transform=None))([0] * 8) for _ in range(2)]
    with pytest.raises(ValueError, match='cutout=5'):
        create_loaders(args, datasets, CONFIG, 5)
