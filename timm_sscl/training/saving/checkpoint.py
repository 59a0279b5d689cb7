"""Write checkpoints that survive a kill, verify them when reading, and find the newest undamaged one."""
import itertools
import logging
import os
import shutil
import zipfile
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Tuple

import torch
from timm.task import TrainingTask
from timm.utils import CheckpointSaver, unwrap_model
from timm.utils.checkpoint_saver import load_checkpoint_metadata

from timm_sscl.models.loading import DESCRIPTION_KEY, describe_model

__all__ = ['RunSaver', 'Position', 'find_newest', 'position_of', 'read_run_state', 'why_damaged', 'replacing',
           'write_text', 'lock_folder', 'StorageError', 'put_aside_later', 'holds_a_run', 'LAST', 'LOCK']

_logger = logging.getLogger(__name__)

LAST = 'last.pth.tar'
LOCK = '.lock'
_ASIDE = '.part'  # suffix of a file that is being written
# files that a run writes before its first checkpoint; folders are those of trackers
_START_FILES = LOCK, 'args.yaml', 'data.json', f'*{_ASIDE}', 'teacher-features.*', 'train-batch-*.jpg', 'timm_sscl'
RUN_STATE = 'run_state'  # key of a run's state in a timm checkpoint


class StorageError(RuntimeError):
    """A file could not be written. Existing files are undamaged."""


class Position(NamedTuple):
    """The position in the training at which a run continues."""
    epoch: int  # counted from 0
    step: int  # completed batches of that epoch


@contextmanager
def replacing(file: Path, copy: bool = False) -> Iterator[Path]:
    """Yield a path to write to, and then replace `file` by it atomically. After a kill, the old or the new file exists.

    Args:
        file: File to replace.
        copy: Whether the path starts as a copy of the file.

    Raises:
        StorageError: The file could not be written (full disk, no permission, no folder).
    """
    aside = file.with_name(file.name + _ASIDE)
    try:
        if copy and file.exists():
            shutil.copyfile(file, aside)
        yield aside
        _flush(aside)
        os.replace(aside, file)
        _flush(file.parent)
    except (OSError, RuntimeError) as error:  # torch's zip writer raises RuntimeError if a write fails
        try:
            aside.unlink(missing_ok=True)
        except OSError:
            pass
        raise StorageError(f"cannot write '{file}': {' '.join(str(error).split())[:300]}. Free space or another "
                           f'--output is needed; the files written before are whole.') from error


def _flush(path: Path) -> None:
    """Write a file, or a folder's list of names, from the cache to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(file: Path, text: str) -> None:
    """Write a small text file atomically.

    Raises:
        StorageError: It could not be written.
    """
    with replacing(file) as aside:
        aside.write_text(text)


@contextmanager
def lock_folder(folder: Path, enabled: bool = True) -> Iterator[None]:
    """Lock a folder against other processes that write to it. The lock ends with this process, however that ends.

    Raises:
        StorageError: Another process holds the lock, or the folder is not writable.
    """
    if not enabled:
        yield
        return
    import fcntl  # POSIX only
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / LOCK, 'w')
    except OSError as error:
        raise StorageError(f"cannot write to the folder '{folder}': {error}. Choose another --output.") from error
    with handle:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, loader workers do not inherit the lock
        except OSError as error:
            raise StorageError(f"'{folder}' is being written by another process; wait for it, or choose another "
                               f'--experiment or --output.') from error
        yield


class RunSaver(CheckpointSaver):
    """timm's CheckpointSaver with atomic writes and the state that a run needs to continue exactly.

    Files are named and ranked as timm's: last, model_best, checkpoint-N for the best epochs, recovery-E-S between
    epochs. `last` is written after all other files of its epoch, so that a run that continues from it lacks none.

    Args:
        folder: Where to write the files.
        task: timm TrainingTask that is trained.
        optimizer: Its optimizer.
        args: Options, stored in every file as a dictionary that torch.load accepts with weights_only=True.
        max_history: Number of epochs whose checkpoints are kept.
        decreasing: Whether a lower metric is better.
    """

    def __init__(
            self,
            folder: Path,
            task: TrainingTask,
            optimizer: torch.optim.Optimizer,
            args: Namespace,
            max_history: int = 10,
            decreasing: bool = False,
    ):
        super().__init__(
            model=unwrap_model(task.get_eval_model()), optimizer=optimizer, args=args, task=task,
            checkpoint_dir=str(folder), recovery_dir=str(folder), decreasing=decreasing, max_history=max_history)
        self.folder = folder
        for leftover in folder.glob(f'*{_ASIDE}'):
            leftover.unlink()

    def save_epoch(self, position: Position, run_state: Dict[str, Any], metric: Optional[float] = None) -> None:
        """Save the end of an epoch: checkpoint-N if it is among the best, model_best, and last.

        Args:
            position: Where the run continues: the next epoch, step 0.
            run_state: Further state of the run.
            metric: Value that ranks the epoch.

        Raises:
            StorageError: A file could not be written. Earlier files are undamaged.
        """
        epoch = position.epoch - 1
        state = self._state(epoch, metric, position, run_state)
        with replacing(self.folder / LAST) as aside:
            torch.save(state, aside)
            _flush(aside)
            self._keep(aside, epoch, metric)
        self._remove_recoveries(keep=())

    def _keep(self, file: Path, epoch: int, metric: Optional[float]) -> None:
        """Rank the epoch as timm does, and link its file before that file becomes `last`."""
        worst = self.checkpoint_files[-1] if self.checkpoint_files else None
        full = len(self.checkpoint_files) >= self.max_history
        if not full or worst is None or worst[1] is None or (metric is not None and self.cmp(metric, worst[1])):
            best = self.best_metric
            if full:
                self._cleanup_checkpoints(1)
            self._duplicate(file, Path(self._checkpoint_path(epoch)))
            self._track_checkpoint(self._checkpoint_path(epoch), epoch, metric, update_best_file=False)
            if self.best_metric != best:
                self._duplicate(file, self.folder / f'model_best{self.extension}')

    def _duplicate(self, src: Path, dst: Path) -> None:
        """Make dst a hard link to src, or a copy, atomically."""
        aside = Path(f'{dst}{_ASIDE}')
        aside.unlink(missing_ok=True)
        try:
            os.link(src, aside)
        except OSError:  # the file system has no hard links
            shutil.copyfile(src, aside)
        os.replace(aside, dst)

    def save_recovery(  # type: ignore[override]  # timm's is called by nobody here
            self,
            position: Position,
            run_state: Dict[str, Any],
    ) -> Path:
        """Save a checkpoint within an epoch. The two newest are kept.

        Returns:
            The file.

        Raises:
            StorageError: It could not be written. Earlier files are undamaged.
        """
        file = self.folder / f'{self.recovery_prefix}-{position.epoch}-{position.step}{self.extension}'
        # timm's own reader continues at the epoch after this number
        state = self._state(position.epoch - 1, None, position, run_state)
        state['saver']['pending'] = (None, None)
        with replacing(file) as aside:
            torch.save(state, aside)
        self.prev_recovery_file, self.curr_recovery_file = self.curr_recovery_file, str(file)
        self._remove_recoveries(keep=(self.prev_recovery_file, self.curr_recovery_file))
        return file

    def drop_recoveries_before(self, position: Position) -> None:
        """Remove recovery files that a kill right after an epoch's checkpoint left behind."""
        for file in self.folder.glob(f'{self.recovery_prefix}-*{self.extension}'):
            epoch, step = file.name[len(self.recovery_prefix) + 1:-len(self.extension)].split('-')
            if (int(epoch), int(step)) < position:
                file.unlink()

    def _remove_recoveries(self, keep: Tuple[str, ...]) -> None:
        for file in self.folder.glob(f'{self.recovery_prefix}-*{self.extension}'):
            if str(file) not in keep:
                file.unlink()

    def _state(
            self,
            epoch: int,
            metric: Optional[float],
            position: Position,
            run_state: Dict[str, Any],
    ) -> Dict[str, Any]:
        state = {
            'epoch': epoch, 'version': 2, 'arch': self.args.model, 'args': _plain(vars(self.args)),
            DESCRIPTION_KEY: describe_model(self.model), 'optimizer': self.optimizer.state_dict(),
            **self.task.get_checkpoint_state(unwrap_fn=self.unwrap_fn),
            **self.task.get_checkpoint_state(ema=True, unwrap_fn=self.unwrap_fn),
            'saver': self.state_dict(epoch, metric),
            RUN_STATE: {**run_state, 'position': tuple(position)},
        }
        if metric is not None:
            state['metric'] = metric
        return state


def _plain(value: Any) -> Any:
    """Convert options to what torch.load accepts with weights_only=True: numbers, texts, containers; others become
    their text.
    """
    if isinstance(value, dict):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value] if isinstance(value, list) else tuple(map(_plain, value))
    return value if value is None or type(value) in (bool, int, float, str) else str(value)


def why_damaged(file: Path) -> str:
    """Return what is wrong with a checkpoint file by its checksums, '' if nothing."""
    try:
        with zipfile.ZipFile(file) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        return str(error) or type(error).__name__
    return f'{broken} in it has another checksum' if broken else ''


def read_run_state(file: Path) -> Optional[Dict[str, Any]]:
    """Return the run's state in a checkpoint, with 'position'; None if no run of this script wrote the file.

    Raises:
        Exception: Whatever torch raises on a damaged file.
    """
    state = load_checkpoint_metadata(str(file))
    state = state.get(RUN_STATE) if isinstance(state, dict) else None
    return None if state is None else {**state, 'position': Position(*state['position'])}


def position_of(checkpoint: Mapping[str, Any]) -> Optional[Position]:
    """Return where the training stood when the content of a checkpoint was saved; None if it does not say."""
    if checkpoint.get(RUN_STATE):
        return Position(*checkpoint[RUN_STATE]['position'])
    return Position(checkpoint['epoch'] + 1, 0) if 'epoch' in checkpoint else None


def find_newest(folder: Path) -> Optional[Path]:
    """Find the undamaged checkpoint of a run with the latest position. Damaged files are logged and left in place.

    Args:
        folder: Folder of a run.

    Returns:
        Its path; None if there is none.
    """
    found: List[Tuple[Position, bool, Path]] = []
    for file in sorted(folder.glob('*.pth.tar')):
        try:
            state = read_run_state(file)
        except Exception as error:  # torch, pickle and zipfile raise many types
            _skip(file, str(error))
            continue
        if state is not None:
            found.append((state['position'], file.name == LAST, file))
    for _, _, file in sorted(found, reverse=True):
        reason = why_damaged(file)
        if not reason:
            return file
        _skip(file, reason)
    return None


def holds_a_run(folder: Path) -> bool:
    """Return whether a folder holds more than the files of a start that failed before its first checkpoint."""
    if not folder.is_dir():
        return folder.exists()
    return any(not any(file.match(pattern) for pattern in _START_FILES) for file in folder.iterdir())


def put_aside_later(folder: Path, position: Position, kept: Path) -> None:
    """Rename the files of a run with a later position than the one it continues from; else `find_newest` would find
    them.

    Args:
        folder: Folder of the run.
        position: Where the run continues.
        kept: The checkpoint from which it continues.
    """
    later = []
    for file in sorted(folder.glob('*.pth.tar')):
        try:
            state = read_run_state(file)
        except Exception:  # damaged; find_newest logs it
            continue
        if state is not None and state['position'] > position and file.resolve() != kept.resolve():
            later.append(file)
    for file in [*later, *(f for f in [folder / 'summary.json'] if later and f.exists())]:
        aside = next(name for i in itertools.count(1)
                     if not (name := file.with_name(f'{file.name}.abandoned-{i}')).exists())
        os.rename(file, aside)
    if later:
        _logger.warning(f'Goes back to epoch {position.epoch + 1}, step {position.step}: later files of {folder} are '
                        f'renamed to *.abandoned-N ({", ".join(file.name for file in later)}).')


def _skip(file: Path, reason: str) -> None:
    _logger.warning(f"Checkpoint '{file}' is damaged and skipped: {' '.join(reason.split())[:200]}.")
