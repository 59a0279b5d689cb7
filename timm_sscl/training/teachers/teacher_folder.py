"""Store trained teachers in folders that are found by the settings of their training."""
import json
import logging
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Optional

from timm.models import safe_model_name
from timm.utils.checkpoint_saver import load_checkpoint_metadata

from ..saving.checkpoint import LAST, why_damaged
from ..errors import OptionError
from ..command_line.option_groups import create_parser
from .teacher import Teacher, pools_as_student, teacher_name
from .teacher_key import differing_from_legacy, legacy_settings, settings_digest, teacher_settings
from .teacher_record import TeacherRecord, weights_digest

__all__ = ['TEACHER_FILE', 'is_trained', 'recorded_file', 'record_teacher', 'read_teacher_record', 'teacher_folder',
    'find_teacher', 'stored_options']

_logger = logging.getLogger('train')

TEACHER_FILE = 'teacher.json'  # file name in a teacher's folder; written when its training is complete


def is_trained(folder: Path) -> bool:
    """Return whether a folder holds a teacher whose training is complete and undamaged."""
    if not (folder / TEACHER_FILE).is_file():
        return False
    reason = why_damaged(folder / LAST)
    if reason:
        _logger.warning(f"The teacher's '{folder / LAST}' is damaged ({reason}): trained again from what is whole.")
    return not reason


def recorded_file(teacher: Teacher, record: TeacherRecord) -> Path:
    """Return the weights file of the teacher that a resumed run started with. If it is gone, look for the same
    settings.

    Raises:
        OptionError: The file is gone or damaged, and there is no other.
    """
    file = Path(record.file or '')
    if file.is_file() and not why_damaged(file):
        return file
    folder = find_teacher(teacher)
    if is_trained(folder):
        return folder / LAST
    raise OptionError(f'--resume: the run was taught by {record}, and that file is gone or damaged; '
                      f'--teacher-checkpoint FILE says where it is.')


def record_teacher(teacher: Teacher, file: Optional[str]) -> TeacherRecord:
    """Return the record of the teacher for checkpoints."""
    facts = Path(file or '').parent / TEACHER_FILE
    epochs = json.loads(facts.read_text())['epochs'] if file and facts.is_file() else None
    dtype = str(next(teacher.model.parameters()).dtype)
    return TeacherRecord(teacher.name, file, epochs, weights_digest(teacher.model), dtype)


def read_teacher_record(file: str, teacher: Teacher) -> Optional[TeacherRecord]:
    """Return the teacher's record in a checkpoint; for version 0.1.0, the teacher that follows from its options, or
    None.
    """
    state = load_checkpoint_metadata(file)
    run_state = state.get('run_state') or {}
    if 'teacher' in run_state:
        return TeacherRecord(**run_state['teacher']) if run_state['teacher'] else None
    options = stored_options(state)
    if not options.get('data_config') or options.get('teacher_checkpoint'):
        return None
    parser = create_parser()
    then = Namespace(**{**{action.dest: action.default for action in parser._actions}, **options})
    folder = teacher_folder_of(replace(teacher, args=then), legacy_settings(then))
    if not (folder / TEACHER_FILE).is_file():
        return None
    epochs = json.loads((folder / TEACHER_FILE).read_text())['epochs']
    return TeacherRecord(teacher_name(then), str(folder / LAST), epochs, '', '')


def teacher_folder(teacher: Teacher) -> Path:
    """Return the folder of the teacher for its data and settings. Its name contains a digest of them."""
    args = teacher.args
    return teacher_folder_of(teacher, {
        'options': teacher_settings(args, teacher.launch), 'training_data': getattr(args, 'training_data', None)})


def teacher_folder_of(teacher: Teacher, settings: Dict[str, Any]) -> Path:
    """Return the folder of the teacher for these settings."""
    args = teacher.args
    settings = dict(
        settings, model=teacher.name, num_classes=teacher.num_classes,
        kwargs=sorted(map(str, teacher.model._model_args.items())),
        data_dir=str(Path(args.data_dir).resolve()) if args.data_dir else None,
        epochs=args.teacher_epochs or args.epochs,
        data_config={k: str(v) for k, v in sorted(args.data_config.items())})
    if pools_as_student(args):
        settings['stem_pool'] = args.stem_pool
    return teacher.root / 'teachers' / f'{safe_model_name(teacher.name)}-{settings_digest(settings)}'


def find_teacher(teacher: Teacher) -> Path:
    """Return the folder of the teacher for these settings: one of version 0.1.0 if its settings were the same, else the
    new one.
    """
    args = teacher.args
    folder, legacy = teacher_folder(teacher), teacher_folder_of(teacher, legacy_settings(args))
    if (folder / TEACHER_FILE).is_file() or not (legacy / TEACHER_FILE).is_file() or why_damaged(legacy / LAST):
        return folder
    state = load_checkpoint_metadata(str(legacy / LAST))
    differ = differing_from_legacy(args, teacher.launch, stored_options(state), state.get('run_state') or {})
    if not differ:
        return legacy
    _logger.info(f'Teacher {teacher.name}: {legacy}, which an earlier version trained, had other settings '
                 f'({", ".join(differ)}) and is not taken.')
    return folder


def stored_options(state: Dict[str, Any]) -> Dict[str, Any]:
    """Return the options in a checkpoint. Version 0.1.0 stored a Namespace."""
    options = state.get('args') or {}
    return dict(options if isinstance(options, dict) else vars(options))
