"""Read the files of a run: options, rows of every epoch, summary, position, and the teacher's rows."""
import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import yaml

from timm_sscl.report.figures import Curve

from ..saving.checkpoint import Position, find_newest, read_run_state
from ..errors import OptionError
from ..command_line.options import ARGS_FILE
from ..saving.resume import SUMMARY_FILE
from ..teachers.teacher_record import TeacherRecord

__all__ = ['RunFiles', 'read_run', 'curve', 'columns_with']

_ROWS_FILE = 'summary.csv'


@dataclass
class RunFiles:
    """What the files of a run say.

    Attributes:
        folder: Folder of the run.
        options: Its options (args.yaml).
        rows: One row per epoch (summary.csv).
        summary: summary.json; None if the run did not end.
        checkpoint: Newest undamaged checkpoint.
        position: Where that checkpoint continues.
        teacher: Record of the teacher; None without a teacher.
        teacher_rows: One row per epoch of the teacher's training; empty if this script did not train it.
    """
    folder: Path
    options: Dict[str, Any]
    rows: List[Dict[str, str]]
    summary: Optional[Dict[str, Any]]
    checkpoint: Path
    position: Position
    teacher: Optional[TeacherRecord]
    teacher_rows: List[Dict[str, str]] = field(default_factory=list)

    @property
    def status(self) -> str:
        """Whether the run is complete, in words."""
        if self.summary is not None:
            return f'Complete: {len(self.rows)} epochs.'
        epoch, step = self.position
        where = f'after epoch {epoch}' if not step else f'in epoch {epoch + 1}, after step {step}'
        return (f'Not complete: the run was interrupted {where} of {self.options.get("epochs")} epochs. What follows '
                f'is measured on its newest checkpoint, {self.checkpoint.name}.')


def read_run(folder: Path) -> RunFiles:
    """Read the files of a run.

    Raises:
        OptionError: The folder holds no run, or a run without a checkpoint.
    """
    if not (folder / ARGS_FILE).is_file():
        raise OptionError(f"'{folder}' holds no run of train.py: there is no {ARGS_FILE}.")
    checkpoint = find_newest(folder)
    if checkpoint is None:
        raise OptionError(f"'{folder}' holds no checkpoint yet, or none that is whole.")
    state = read_run_state(checkpoint) or {}
    teacher = TeacherRecord(**state['teacher']) if state.get('teacher') else None
    summary = folder / SUMMARY_FILE
    return RunFiles(
        folder, yaml.safe_load((folder / ARGS_FILE).read_text()), _read_rows(folder / _ROWS_FILE),
        json.loads(summary.read_text()) if summary.is_file() else None, checkpoint, state['position'], teacher,
        _teacher_rows(folder, teacher))


def _teacher_rows(folder: Path, teacher: Optional[TeacherRecord]) -> List[Dict[str, str]]:
    """Return the rows of the teacher's training. Its file was recorded relative to the folder that the run was started
    in.
    """
    if teacher is None or teacher.file is None or teacher.epochs is None:
        return []
    where = Path(teacher.file).parent
    moved = [parent / 'teachers' / where.name for parent in folder.resolve().parents[:2]]
    return next((rows for place in (where, *moved) for rows in [_read_rows(place / _ROWS_FILE)] if rows), [])


def _read_rows(file: Path) -> List[Dict[str, str]]:
    if not file.is_file():
        return []
    with open(file, newline='') as stream:
        return list(csv.DictReader(stream))


def curve(rows: List[Dict[str, str]], column: str, label: str) -> Curve:
    """Return a column over the epochs, counted from 1; epochs without a value are left out."""
    points: List[Tuple[int, float]] = [(int(row['epoch']) + 1, float(row[column])) for row in rows if row.get(column)]
    return Curve(label, [epoch for epoch, _ in points], [value for _, value in points])


def columns_with(rows: List[Dict[str, str]], prefix: str) -> Dict[str, str]:
    """Return what follows the prefix in the names of columns -> the column."""
    return {name.removeprefix(prefix): name for name in (rows[0] if rows else ()) if name.startswith(prefix)}
