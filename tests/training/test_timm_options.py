"""Every option of timm's train.py stands in its group with its default, and changes here what it changes there.

timm_options.py holds the names. `observes`, in the files test_timm_*_options.py, makes the table from option to
observable: a test that runs the part of train.py which the option is about, with and without it. What has none must
stand by its name on the manual's page of differences.
"""
import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from timm_options import ALL, OBSERVED, TIMM_OPTIONS, dest
from tiny_training import Tiny, parse
from timm_sscl.distillation.teacher_input import TeacherInput
from timm_sscl.training.command_line.loss_flags import LOSS_FLAGS
from timm_sscl.training.command_line.refused_options import UNSUPPORTED
from timm_sscl.training.command_line.options import OptionError
from timm_sscl.training.command_line.option_groups import create_parser
from timm_sscl.training.datasets import resolve_input
from timm_sscl.training.teachers.teacher import Teacher
from timm_sscl.training.teachers.teacher_folder import teacher_folder

DIFFERENCES = (Path(__file__).resolve().parents[2] / 'docs' / 'pages' / 'differences.md').read_text()
IN_DIFFERENCES = set(re.findall(r'--[a-z][a-z_-]*[a-z]', DIFFERENCES))
CHANGE_NOTHING = {'--no-prefetcher', '--local_rank'}  # accepted, and the page says why


def test_every_option_has_an_observable_or_a_reason_on_the_page():
    for file in Path(__file__).parent.glob('test_timm_*_options.py'):
        importlib.import_module(file.stem)  # fills the table, also where this file is run alone
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
    for name, flag in LOSS_FLAGS.items():  # a flag that is not given leaves the loss's own default
        defaults[f'--{name.replace("_", "-")}'] = flag.declared.default
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
