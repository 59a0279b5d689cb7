"""Which run to go on with, and from which checkpoint."""
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

from .checkpoint import LAST, find_newest, holds_a_run, why_damaged
from .options import ARGS_FILE, AUTO

__all__ = ['SUMMARY_FILE', 'restore', 'find_run', 'newest_file', 'options_as_yaml']

_logger = logging.getLogger('train')

SUMMARY_FILE = 'summary.json'  # in a run's folder, written at its end


def restore(task: TrainingTask, file: str, optimizer: Optional[torch.optim.Optimizer] = None) -> Optional[int]:
    """Load a checkpoint of this task; the epoch to go on with, where the file tells."""
    try:
        epoch = resume_task_checkpoint(task, file, optimizer=optimizer)
        if task.has_ema():
            load_task_ema_checkpoint(task, file)
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"--resume: '{file}' is no checkpoint of this model and run: "
                         f'{" ".join(str(error).split())[:300]}') from error
    return epoch


def find_run(args: Namespace, root: Path, data_config: Dict[str, Any]) -> Tuple[Path, str]:
    """Folder of this run, and the checkpoint that it goes on from ('' where it starts).

    --resume FOLDER continues that one; auto the --experiment, or the newest run under --output with these very options,
    where there is one. A folder that holds a run is left alone otherwise.
    """
    size = data_config['input_size'][-1]
    name = args.experiment or '-'.join(
        [datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(args.model), str(size)])
    folder = root / name
    if args.resume == AUTO:
        folder = folder if args.experiment else _newest_run(args, root) or folder
        return folder, newest_file(folder)
    if args.resume and os.path.isdir(args.resume):
        folder = Path(args.resume)
        checkpoint = newest_file(folder)
        if not checkpoint and not (folder / ARGS_FILE).is_file():
            raise FileNotFoundError(f"--resume: '{folder}' holds no checkpoint that is whole, and no run.")
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
    """Newest whole checkpoint in a folder; one that timm's script wrote where this one wrote none."""
    file = find_newest(folder) or folder / LAST
    return str(file) if file.is_file() and not why_damaged(file) else ''


def _newest_run(args: Namespace, root: Path) -> Optional[Path]:
    """Newest run under root that was started with these options and did not end."""
    options = yaml.safe_load(options_as_yaml(args))
    for file in sorted(root.glob(f'*/{ARGS_FILE}'), key=lambda f: f.stat().st_mtime, reverse=True):
        if not (file.parent / SUMMARY_FILE).exists() and _read_options(file) == options:
            return file.parent
    return None


def _read_options(file: Path) -> Any:
    try:
        return yaml.safe_load(file.read_text())
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        _logger.warning(f"--resume auto: '{file}' cannot be read and is left out: {' '.join(str(error).split())}")


def options_as_yaml(args: Namespace) -> str:
    """The options as YAML; `--config` and `--resume` read them."""
    skip = ('losses', 'loss_options', 'data_config', 'training_data', 'plugin_digests', 'resume', 'config')
    options = {name: value for name, value in sorted(vars(args).items()) if name not in skip}
    return yaml.safe_dump(options, default_flow_style=False)
