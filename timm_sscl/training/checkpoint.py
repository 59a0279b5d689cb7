"""Checkpoints that survive a kill: written aside and renamed, checked when read, the newest whole one found again."""
import itertools
import logging
import os
import shutil
import zipfile
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
from timm.task import TrainingTask
from timm.utils import CheckpointSaver, unwrap_model
from timm.utils.checkpoint_saver import load_checkpoint_metadata

__all__ = ['RunSaver', 'Position', 'find_newest', 'read_run_state', 'why_damaged', 'replacing', 'write_text',
           'lock_folder', 'StorageError', 'put_aside_later', 'holds_a_run', 'LAST', 'LOCK']

_logger = logging.getLogger(__name__)

LAST = 'last.pth.tar'
LOCK = '.lock'
_ASIDE = '.part'  # ending of a file that is being written
# what a run writes before its first checkpoint; folders are trackers'
_START_FILES = LOCK, 'args.yaml', 'data.json', f'*{_ASIDE}', 'teacher-features.*', 'train-batch-*.jpg', 'timm_sscl'
RUN_STATE = 'run_state'  # key of what a run needs beyond timm's checkpoint


class StorageError(RuntimeError):
    """Something could not be written; what was there before is whole."""


class Position(NamedTuple):
    """Where a run goes on."""
    epoch: int  # counted from 0
    step: int  # batches of that epoch that are done


@contextmanager
def replacing(file: Path, copy: bool = False) -> Iterator[Path]:
    """A path beside `file` to write to, which then takes its place at once; a kill leaves the old file or the new one.

    Args:
        file: What is replaced.
        copy: Whether the path begins as a copy of the file.

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
    except (OSError, RuntimeError) as error:  # torch's zip writer raises a RuntimeError for a failed write
        try:
            aside.unlink(missing_ok=True)
        except OSError:
            pass
        raise StorageError(f"cannot write '{file}': {' '.join(str(error).split())[:300]}. Free space or another "
                           f'--output is needed; the files written before are whole.') from error


def _flush(path: Path) -> None:
    """Have the file, or the folder's names, on the disk and not in a cache only."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(file: Path, text: str) -> None:
    """Write a small file at once.

    Raises:
        StorageError: It could not be written.
    """
    with replacing(file) as aside:
        aside.write_text(text)


@contextmanager
def lock_folder(folder: Path, enabled: bool = True) -> Iterator[None]:
    """Hold a folder: no second process writes it meanwhile. The lock ends with the process, however that ends.

    Raises:
        StorageError: Another process holds it, or it cannot be written.
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
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not held on by a loader's workers
        except OSError as error:
            raise StorageError(f"'{folder}' is being written by another process; wait for it, or choose another "
                               f'--experiment or --output.') from error
        yield


class RunSaver(CheckpointSaver):
    """timm's CheckpointSaver whose files are whole at any moment, and which keeps what a run needs to go on exactly.

    Files are named and ranked as timm's: last, model_best, checkpoint-N for the best epochs, recovery-E-S between them.
    `last` is written after all that belongs to its epoch, so a run that goes on from it misses nothing.

    Args:
        folder: Where the files go.
        task: timm TrainingTask that is trained.
        optimizer: Its optimizer.
        args: Options, kept in every file as a dictionary, which torch.load reads with its default weights_only=True.
        max_history: How many epochs' checkpoints are kept.
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
        """Keep the end of an epoch: checkpoint-N where it is among the best, model_best, and last.

        Args:
            position: Where the run goes on: the next epoch, step 0.
            run_state: What else it needs.
            metric: Value that ranks the epoch.

        Raises:
            StorageError: A file could not be written; the earlier ones are whole.
        """
        epoch = position.epoch - 1
        state = self._state(epoch, metric, position, run_state)
        with replacing(self.folder / LAST) as aside:
            torch.save(state, aside)
            _flush(aside)
            self._keep(aside, epoch, metric)
        self._remove_recoveries(keep=())

    def _keep(self, file: Path, epoch: int, metric: Optional[float]) -> None:
        """Rank the epoch as timm does, linking before the newest file becomes `last`."""
        worst = self.checkpoint_files[-1] if self.checkpoint_files else None
        full = len(self.checkpoint_files) >= self.max_history
        if not full or worst[1] is None or (metric is not None and self.cmp(metric, worst[1])):
            best = self.best_metric
            if full:
                self._cleanup_checkpoints(1)
            self._duplicate(file, Path(self._checkpoint_path(epoch)))
            self._track_checkpoint(self._checkpoint_path(epoch), epoch, metric, update_best_file=False)
            if self.best_metric != best:
                self._duplicate(file, self.folder / f'model_best{self.extension}')

    def _duplicate(self, src: Path, dst: Path) -> None:
        aside = Path(f'{dst}{_ASIDE}')
        aside.unlink(missing_ok=True)
        try:
            os.link(src, aside)
        except OSError:  # a file system without hard links
            shutil.copyfile(src, aside)
        os.replace(aside, dst)

    def save_recovery(self, position: Position, run_state: Dict[str, Any]) -> Path:
        """Keep a moment inside an epoch; the two newest are held.

        Returns:
            The file.

        Raises:
            StorageError: It could not be written; the earlier ones are whole.
        """
        file = self.folder / f'{self.recovery_prefix}-{position.epoch}-{position.step}{self.extension}'
        # timm's own reader would go on at the epoch after the one named here
        state = self._state(position.epoch - 1, None, position, run_state)
        state['saver']['pending'] = (None, None)
        with replacing(file) as aside:
            torch.save(state, aside)
        self.prev_recovery_file, self.curr_recovery_file = self.curr_recovery_file, str(file)
        self._remove_recoveries(keep=(self.prev_recovery_file, self.curr_recovery_file))
        return file

    def drop_recoveries_before(self, position: Position) -> None:
        """Remove what a kill right after an epoch's checkpoint left over."""
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
            'optimizer': self.optimizer.state_dict(),
            **self.task.get_checkpoint_state(unwrap_fn=self.unwrap_fn),
            **self.task.get_checkpoint_state(ema=True, unwrap_fn=self.unwrap_fn),
            'saver': self.state_dict(epoch, metric),
            RUN_STATE: {**run_state, 'position': tuple(position)},
        }
        if metric is not None:
            state['metric'] = metric
        return state


def _plain(value: Any) -> Any:
    """Options as what torch.load takes for harmless: numbers, texts and containers of them; another as its text."""
    if isinstance(value, dict):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value] if isinstance(value, list) else tuple(map(_plain, value))
    return value if value is None or type(value) in (bool, int, float, str) else str(value)


def why_damaged(file: Path) -> str:
    """What is wrong with a checkpoint file, by its checksums; '' for a whole one."""
    try:
        with zipfile.ZipFile(file) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        return str(error) or type(error).__name__
    return f'{broken} in it has another checksum' if broken else ''


def read_run_state(file: Path) -> Optional[Dict[str, Any]]:
    """What a checkpoint keeps beyond timm's, 'position' among it; None where no run of this script wrote it.

    Raises:
        Exception: Whatever torch raises on a damaged file.
    """
    state = load_checkpoint_metadata(str(file))
    state = state.get(RUN_STATE) if isinstance(state, dict) else None
    return None if state is None else {**state, 'position': Position(*state['position'])}


def find_newest(folder: Path) -> Optional[Path]:
    """The whole checkpoint of a run that is furthest; damaged ones are named in a warning and left where they are.

    Args:
        folder: Folder of a run.

    Returns:
        Its path; None where there is none.
    """
    found: List[Tuple[Position, bool, Path]] = []
    for file in sorted(folder.glob('*.pth.tar')):
        try:
            state = read_run_state(file)
        except Exception as error:  # torch, pickle and zipfile each raise their own
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
    """Whether a folder holds anything but what a start leaves that failed before its first checkpoint."""
    if not folder.is_dir():
        return folder.exists()
    return any(not any(file.match(pattern) for pattern in _START_FILES) for file in folder.iterdir())


def put_aside_later(folder: Path, position: Position, kept: Path) -> None:
    """Rename what a run left that goes back to an earlier checkpoint: else it would be taken for the newest again.

    Args:
        folder: Folder of the run.
        position: Where it goes on.
        kept: The checkpoint that it goes on from.
    """
    later = []
    for file in sorted(folder.glob('*.pth.tar')):
        try:
            state = read_run_state(file)
        except Exception:  # damaged; named by find_newest
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
