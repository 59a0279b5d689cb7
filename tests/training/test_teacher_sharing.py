"""Which settings make two runs share a teacher, and that a run goes on with the teacher that it began with."""
import json
import logging
from argparse import Namespace

import pytest
import timm
import torch
from timm.utils.checkpoint_saver import load_checkpoint_metadata

from files import write_images
from runs import TINY, run_here
from timm_sscl.training.errors import OptionError
from timm_sscl.training.command_line.refused_options import UNSUPPORTED
from timm_sscl.training.command_line.option_groups import create_parser
from timm_sscl.training.command_line.options import parse_args
from timm_sscl.training.teachers.teacher_key import IRRELEVANT, differing_from_legacy, teacher_settings
from timm_sscl.training.teachers.teacher_record import (
    TeacherRecord, check_asked_teacher, check_same_teacher, weights_digest)
from timm_sscl.training.datasets import resolve_input
from timm_sscl.training.student import create_student
from timm_sscl.training.teachers.teacher import Teacher, create_teacher
from timm_sscl.training.teachers.teacher_folder import teacher_folder_of
from timm_sscl.training.teachers.teacher_key import legacy_settings

RUN = [*TINY, '--epochs', '1', '--output', 'out']
OPTIONS = [action for action in create_parser()._actions if action.dest not in UNSUPPORTED and action.dest != 'help']


def plain_args():
    return parse_args(['--data-dir', 'somewhere'])[0]


@pytest.mark.parametrize('action', OPTIONS, ids=lambda action: action.dest)
def test_every_option_counts_unless_it_is_listed(action):
    args = plain_args()
    setattr(args, action.dest, ['another'] if isinstance(action.default, list) else 'another')
    assert (teacher_settings(args) != teacher_settings(plain_args())) == (action.dest not in IRRELEVANT)


def test_option_that_this_list_does_not_know_counts_where_it_is_not_the_default(monkeypatch):
    from timm_sscl.training.teachers import teacher_key

    def parser():
        made = create_parser()
        made.add_argument('--brand-new', type=float, default=1.)
        return made
    monkeypatch.setattr(teacher_key, 'create_parser', parser)
    args = plain_args()
    args.brand_new = 1  # a file may say 1 for 1.
    assert teacher_settings(args) == {}
    args.brand_new = 2.
    assert teacher_settings(args) == {'brand_new': 2.}


def test_list_holds_no_name_that_is_gone():
    assert IRRELEVANT <= {action.dest for action in OPTIONS}


def test_defaults_count_for_nothing_and_the_launch_counts():
    args = plain_args()
    assert teacher_settings(args) == teacher_settings(args, dict(processes=1, mixed_precision='no')) == {}
    assert teacher_settings(args, dict(processes=2, mixed_precision='bf16')) == dict(
        processes=2, mixed_precision='bf16')


def test_plateau_schedule_follows_the_validation_data():
    args = plain_args()
    args.val_split = 'other'
    assert teacher_settings(args) == {}
    args.sched = 'plateau'
    assert teacher_settings(args) == dict(sched='plateau', val_split='other')


def test_class_map_counts_by_what_is_in_it(tmp_path):
    args, found = plain_args(), []
    for text in ('a 0\n', 'a 1\n'):
        (tmp_path / 'map.txt').write_text(text)
        args.class_map = str(tmp_path / 'map.txt')
        found.append(teacher_settings(args))
    assert found[0] != found[1]


def test_settings_that_version_0_1_0_did_not_count():
    args, stored = plain_args(), vars(plain_args())
    assert differing_from_legacy(args, {}, stored, {}) == []
    assert differing_from_legacy(args, {}, {**stored, 'fast_norm': True, 'lr': 3.}, {}) == ['fast_norm']  # lr it did
    assert differing_from_legacy(args, dict(processes=2), stored, dict(processes=1)) == ['processes']
    del stored['worker_seeding']  # of a checkpoint that is older than the option
    assert differing_from_legacy(args, {}, stored, {}) == []


def rewrite(state, file):
    torch.save(state, file.with_name('aside'))  # the state is mapped from the file
    file.with_name('aside').replace(file)


# ---- the data

@pytest.mark.slow
def test_teacher_of_other_data_in_the_same_folder_is_not_taken(tmp_path, monkeypatch):
    write_images(tmp_path / 'data', per_class=4)
    args = ['--data-dir', 'data', '--model', 'spiking_test_resnet', '--img-size', '32', '--timesteps', '1',
            '--batch-size', '4', '--workers', '0', '--epochs', '1', '--output', 'out', '--experiment']

    def teachers(name):
        run_here([*args, name], tmp_path, monkeypatch)
        return len(list((tmp_path / 'out/teachers').iterdir()))

    assert (teachers('first'), teachers('same')) == (1, 1)
    for split in ('train', 'validation'):  # the labels of two classes change places
        (tmp_path / 'data' / split / 'class0').rename(tmp_path / 'data' / split / 'class9')
    assert teachers('renamed') == 2
    (tmp_path / 'data/train/class1/0.png').unlink()
    assert teachers('fewer') == 3


# ---- a teacher of version 0.1.0

LEGACY = 'test_resnet-920dce3902'  # the folder that version 0.1.0 made for TINY


@pytest.mark.slow
def test_teacher_of_0_1_0_is_found_where_it_had_the_same_settings(tmp_path, monkeypatch, caplog):
    args = [*TINY, '--output', 'out', '--teacher-epochs', '2', '--epochs', '1']
    run_here([*args, '--experiment', 'first'], tmp_path, monkeypatch)
    folder, = (tmp_path / 'out/teachers').iterdir()
    assert folder.name != LEGACY
    state = load_checkpoint_metadata(str(folder / 'last.pth.tar'))
    state['args'] = Namespace(**state['args'])  # as version 0.1.0 wrote it
    rewrite(state, folder / 'last.pth.tar')
    folder.rename(folder.with_name(LEGACY))
    with caplog.at_level(logging.INFO):
        run_here([*args, '--experiment', 'second'], tmp_path, monkeypatch)
    assert f'found out/teachers/{LEGACY}' in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        run_here([*args, '--experiment', 'third', '--amp', '--amp-dtype', 'bfloat16'], tmp_path, monkeypatch)
    assert f'out/teachers/{LEGACY}, which an earlier version trained, had other settings (amp' in caplog.text
    assert len(list((tmp_path / 'out/teachers').iterdir())) == 2


# ---- the teacher of a resumed run

@pytest.fixture(scope='module')
def taught(tmp_path_factory):
    """Folder in which a run of one epoch was taught by a teacher of one epoch."""
    cwd = tmp_path_factory.mktemp('taught')
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_here([*RUN, '--experiment', 'run'], cwd, monkeypatch)
    return cwd


@pytest.fixture
def copy(taught, tmp_path):
    import shutil
    shutil.copytree(taught / 'out', tmp_path / 'out')
    return tmp_path


def test_resumed_run_keeps_its_teacher_whatever_the_epochs(copy, monkeypatch, caplog):
    teacher, = (copy / 'out/teachers').iterdir()
    with caplog.at_level(logging.INFO):
        run_here(['--resume', 'out/run', '--epochs', '3', '--lr', '0.001'], copy, monkeypatch)
    assert list((copy / 'out/teachers').iterdir()) == [teacher]
    assert f'goes on with out/teachers/{teacher.name}/last.pth.tar' in caplog.text
    facts = json.loads((copy / 'out/run/summary.json').read_text())['teacher']
    model = timm.create_model('test_resnet', num_classes=10, checkpoint_path=teacher / 'last.pth.tar')
    assert facts['file'] == f'out/teachers/{teacher.name}/last.pth.tar' and facts['digest'] == weights_digest(model)
    record = load_checkpoint_metadata(str(copy / 'out/run/last.pth.tar'))['run_state']['teacher']
    assert record['digest'] == facts['digest'] and record['epochs'] == 1


def fails(args, cwd, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit_:
        run_here(args, cwd, monkeypatch)
    assert exit_.value.code == 2
    line, = [x for x in capsys.readouterr().err.splitlines() if x.startswith('error: ')]
    return line


def test_another_teacher_for_a_resumed_run_is_an_error_that_names_both(copy, monkeypatch, capsys):
    before = {file: file.read_bytes() for file in copy.rglob('*.pth.tar')}
    torch.save(timm.create_model('test_resnet', num_classes=10).state_dict(), copy / 'other.pth')
    folder, = (copy / 'out/teachers').iterdir()
    resume = ['--resume', 'out/run', '--epochs', '2']
    for options, words in (
            (['--teacher-epochs', '2'], ['--teacher-epochs 2']), (['--teacher', 'test_vit'], ['--teacher test_vit']),
            (['--teacher-checkpoint', 'other.pth'], ["'other.pth'"])):
        line = fails([*resume, *options], copy, monkeypatch, capsys)
        for word in [*words, f'out/teachers/{folder.name}/last.pth.tar', 'was taught by']:
            assert word in line, line
    assert {file: file.read_bytes() for file in copy.rglob('*.pth.tar')} == before
    folder.rename(copy / 'moved')
    line = fails(resume, copy, monkeypatch, capsys)
    assert 'is gone or damaged' in line and '--teacher-checkpoint' in line
    run_here([*resume, '--teacher-checkpoint', 'moved/last.pth.tar'], copy, monkeypatch)


def test_weights_that_changed_in_their_file_are_noticed(copy, monkeypatch, capsys):
    folder, = (copy / 'out/teachers').iterdir()
    state = load_checkpoint_metadata(str(folder / 'last.pth.tar'))
    state['state_dict']['fc.bias'] += 1
    rewrite(state, folder / 'last.pth.tar')
    line = fails(['--resume', 'out/run', '--epochs', '2'], copy, monkeypatch, capsys)
    assert line.count('digest') == 2 and 'was taught by' in line


def test_run_of_0_1_0_goes_on_with_its_teacher(copy, monkeypatch, caplog):
    """Its checkpoints name no teacher: the options in them led to one."""
    folder, = (copy / 'out/teachers').iterdir()
    for file in [copy / 'out/run/last.pth.tar', folder / 'last.pth.tar']:
        state = load_checkpoint_metadata(str(file))
        state['run_state'].pop('teacher')
        options = state['args']
        options['data_config'] = {k: tuple(v) if isinstance(v, list) else v for k, v in options['data_config'].items()}
        state['args'] = Namespace(**options)
        rewrite(state, file)
    for file in [*(copy / 'out/run').glob('checkpoint*'), *(copy / 'out/run').glob('model_best*')]:
        file.unlink()
    (copy / 'out/run/summary.json').unlink()
    args = parse_args([*RUN, '--experiment', 'run'])[0]
    args.data_config = resolve_input(args, create_student(args, 10))
    teacher = Teacher(args, *create_teacher(args, 10, args.data_config), 10, copy / 'out')
    legacy = teacher_folder_of(teacher, legacy_settings(args))
    folder.rename(legacy)
    with caplog.at_level(logging.INFO):
        run_here(['--resume', 'out/run', '--epochs', '2'], copy, monkeypatch)
    assert f'goes on with out/teachers/{legacy.name}/last.pth.tar' in caplog.text
    assert list((copy / 'out/teachers').iterdir()) == [legacy]


def test_record_compares_weights_of_one_precision():
    record = TeacherRecord('resnet', 'a.pth', 3, 'abc', 'torch.float32')
    check_same_teacher(record, record._replace(file='moved.pth'))
    check_same_teacher(record, record._replace(digest='other', dtype='torch.bfloat16'))  # cannot be compared
    check_asked_teacher(record, 'resnet', None)
    with pytest.raises(OptionError, match="taught by resnet, 'a.pth', 3 epochs .digest abc.*now .*'b.pth'"):
        check_same_teacher(record, record._replace(file='b.pth', digest='def'))


def test_digest_is_of_names_types_and_values():
    a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    b.load_state_dict(a.state_dict())
    assert weights_digest(a) == weights_digest(b)
    with torch.no_grad():
        b.bias[0] += 1
    assert weights_digest(a) != weights_digest(b)
    assert weights_digest(a) != weights_digest(a.double())
    assert weights_digest(torch.nn.BatchNorm2d(2)) == weights_digest(torch.nn.BatchNorm2d(2))  # a 0-d buffer as well
