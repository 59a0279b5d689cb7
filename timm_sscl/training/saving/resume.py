"""Determine the folder of a run and the checkpoint from which it continues."""
import logging
import os
import pickle
from argparse import Namespace
from datetime import datetime
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import torch
import yaml
from timm.models import safe_model_name
from timm.task._helpers import load_task_ema_checkpoint, resume_task_checkpoint
from timm.task.task import TrainingTask
from timm.utils.checkpoint_saver import load_checkpoint_metadata

from timm_sscl.models.finite import check_finite

from .checkpoint import LAST, find_newest, holds_a_run, why_damaged
from ..command_line.loss_flags import LOSS_FLAGS
from ..command_line.option_groups import create_parser
from ..command_line.options import ARGS_FILE, AUTO
from ..teachers.teacher_key import plain

__all__ = ['SUMMARY_FILE', 'restore', 'find_run', 'newest_file', 'newest_unfinished', 'options_as_yaml', 'runs_below']

_logger = logging.getLogger('train')

_SHOWN = 3  # number of runs that a message names

SUMMARY_FILE = 'summary.json'  # file name in a run's folder; written at the end of the run


def restore(task: TrainingTask, file: str, optimizer: Optional[torch.optim.Optimizer] = None) -> Optional[int]:
    """Load a checkpoint of this task. Return the epoch at which to continue, or None if the file does not say.

    Raises:
        ValueError: The file is not a checkpoint of this model and run, or its weights are not finite.
    """
    try:
        epoch = resume_task_checkpoint(task, file, optimizer=optimizer)
        if task.has_ema():
            load_task_ema_checkpoint(task, file)
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"--resume: '{file}' is no checkpoint of this model and run: "
                         f'{" ".join(str(error).split())[:300]}') from error
    content = load_checkpoint_metadata(file)
    for name in ('state_dict', 'state_dict_ema', 'model'):  # "model" in checkpoints of old versions of timm
        check_finite(content.get(name) or {}, f"--resume: '{file}'")
    return epoch


def runs_below(folder: Path) -> str:
    """Return which runs the folders in a folder hold, as an addition to an error message; '' if there are none."""
    found = sorted(str(file.parent) for file in folder.glob(f'*/{ARGS_FILE}'))
    return f'; folders in it hold runs: {", ".join(found[-_SHOWN:])}' if found else ''


def find_run(args: Namespace, root: Path, data_config: Dict[str, Any]) -> Tuple[Path, str]:
    """Return the folder of this run, and the checkpoint from which it continues ('' if it starts).

    --resume FOLDER continues the run in this folder. --resume auto continues the run of --experiment, or the newest
    unfinished run under --output with exactly these options, if there is one. Otherwise a folder that holds a run is
    not written to.
    """
    size = data_config['input_size'][-1]
    name = args.experiment or '-'.join(
        [datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(args.model), str(size)])
    folder = root / name
    if args.resume == AUTO:
        folder = folder if args.experiment else newest_unfinished(args, root) or folder
        return folder, newest_file(folder)
    if args.resume and os.path.isdir(args.resume):
        folder = Path(args.resume)
        checkpoint = newest_file(folder)
        if not checkpoint and not (folder / ARGS_FILE).is_file():
            raise FileNotFoundError(f"--resume: '{folder}' holds no checkpoint that is whole, and no run"
                                    f'{runs_below(folder)}.')
        return folder, checkpoint
    if args.resume:
        file = Path(args.resume)
        if not file.is_file():
            raise FileNotFoundError(f"--resume: there is no checkpoint '{file}'.")
        if why_damaged(file):
            raise ValueError(f"--resume: '{file}' is damaged or no checkpoint ({why_damaged(file)}); --resume "
                             f'{file.parent} takes the newest one that is whole.')
        if file.parent.resolve() == folder.resolve():
            return folder, str(file)
    if holds_a_run(folder):
        raise FileExistsError(f"--experiment: '{folder}' holds a run already; choose another name, "
                              f'or --resume {folder}.')
    return folder, args.resume


def newest_file(folder: Path) -> str:
    """Return the newest undamaged checkpoint in a folder; one written by timm's script if this script wrote none; ''
    for none.
    """
    file = find_newest(folder) or folder / LAST
    return str(file) if file.is_file() and not why_damaged(file) else ''


def newest_unfinished(args: Namespace, root: Path) -> Optional[Path]:
    """Return the newest unfinished run under root that was started with these options, or runs of these seeds; or None.
    """
    options = _differing(yaml.safe_load(options_as_yaml(args)))
    for file in sorted(root.glob(f'*/{ARGS_FILE}'), key=lambda f: f.stat().st_mtime, reverse=True):
        if not (file.parent / SUMMARY_FILE).exists() and _differing(_read_options(file)) == options:
            return file.parent
    return None


def _differing(options: Any) -> Any:
    """Return the options that differ from their defaults, without those that change no training. A file of an earlier
    version lacks later options.
    """
    if not isinstance(options, dict):
        return None
    parser = create_parser()
    defaults = {name: plain(parser.get_default(name)) for name in options}
    implied = {name: plain(LOSS_FLAGS[name].declared.default) for name in options if name in LOSS_FLAGS}
    return {name: plain(value) for name, value in options.items()
            if name != 'report' and plain(value) != defaults[name]
            and (name not in implied or plain(value) != implied[name])}


def _read_options(file: Path) -> Any:
    try:
        return yaml.safe_load(file.read_text())
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        _logger.warning(f"--resume auto: '{file}' cannot be read and is left out: {' '.join(str(error).split())}")


def options_as_yaml(args: Namespace) -> str:
    """Return the options as YAML, which `--config` and `--resume` read."""
    skip = ('losses', 'loss_options', 'data_config', 'training_data', 'plugin_digests', 'fit_workers', 'resume',
            'config')
    options = {name: value for name, value in sorted(vars(args).items()) if name not in skip}
    return yaml.safe_dump(options, default_flow_style=False)
