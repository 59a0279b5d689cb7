"""End the script with one line for wrong input, failures and signals, and print the command that resumes the run."""
import os
import shlex
import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, List, Optional

from timm_sscl.data.samples import FailedTransform, UnreadableSample, WrongLabel, WrongSample
from timm_sscl.distillation.loss_terms import WrongLoss

from .saving.checkpoint import StorageError, find_newest
from .errors import OptionError, end_with_line
from .process_failures import ProcessDied, as_process_failure
from .steps.stop import Interrupted

__all__ = ['NonFiniteLoss', 'OtherProcessFailed', 'INPUT_ERRORS', 'DATA_ERRORS', 'RUN_ERRORS', 'exit_with_line',
    'name_dead_processes', 'one_line_errors', 'report_resume_command', 'resume_command', 'launcher']


class NonFiniteLoss(RuntimeError):
    """The loss of a step, or a weight, is nan or infinite. It was not saved."""


class OtherProcessFailed(RuntimeError):
    """Another process found the reason to stop and reports it."""


# these errors end a run with one line; others keep their traceback
INPUT_ERRORS = OptionError, FileNotFoundError, FileExistsError, NotImplementedError, ValueError
DATA_ERRORS = UnreadableSample, WrongLabel, WrongSample, FailedTransform
RUN_ERRORS = StorageError, NonFiniteLoss, OtherProcessFailed, ProcessDied, WrongLoss, *DATA_ERRORS
# a resumed run would meet these errors again
_LASTING_ERRORS = WrongLabel, WrongSample, WrongLoss


def exit_with_line(error: Exception, code: int) -> None:
    """Print an error as one line and end the script."""
    lines = str(error).strip().split('\n') if isinstance(error, RUN_ERRORS) else [str(error)]
    # an error from a loader worker includes its traceback
    text = lines[-1].partition(f'{type(error).__name__}: ')[2] or ' '.join(lines)
    end_with_line(text, code)


@contextmanager
def name_dead_processes() -> Iterator[None]:
    """Convert errors that another process's end causes inside to ProcessDied."""
    try:
        yield
    except (Interrupted, *RUN_ERRORS, OptionError):
        raise
    except (RuntimeError, OSError) as error:
        died = as_process_failure(error, int(os.environ.get('WORLD_SIZE', 1)))
        if died is None:
            raise
        if threading.current_thread() is threading.main_thread() and hasattr(signal, 'SIGCHLD'):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise the error again
        raise died from error


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the script with one line that says what to do if the input is wrong."""
    try:
        with name_dead_processes():
            yield
    except (*INPUT_ERRORS, *RUN_ERRORS) as error:
        exit_with_line(error, 2)


@contextmanager
def report_resume_command(script: str, folder: Optional[Path] = None, group: Optional[Path] = None) -> Iterator[None]:
    """Print one line if a training inside stops early, and the command that resumes it where that can help.

    Args:
        script: File of the running script.
        folder: Folder of the run; None if there is nothing to resume.
        group: Folder of the runs of --seeds, which are then resumed together.
    """
    try:
        with name_dead_processes():
            yield
    except (Interrupted, *RUN_ERRORS) as error:
        if folder is not None:
            how = 'A resumed run would fail in the same way until that is mended.' if isinstance(
                error, _LASTING_ERRORS) else f'To go on: {resume_command(script, group or folder)}'
            print(f'Newest whole checkpoint: {find_newest(folder) or "none yet"}\n{how}', file=sys.stderr, flush=True)
        exit_with_line(error, 128 + error.signal_number if isinstance(error, Interrupted) else 1)


def launcher() -> List[str]:
    """Return how this run was started: the words before the script on the command line."""
    precision = os.environ.get('ACCELERATE_MIXED_PRECISION', 'no')
    setting = [] if precision == 'no' else [f'ACCELERATE_MIXED_PRECISION={precision}']
    if 'TORCHELASTIC_RUN_ID' in os.environ:
        processes = os.environ.get('LOCAL_WORLD_SIZE', os.environ.get('WORLD_SIZE', '1'))
        return [*setting, 'torchrun', '--nproc_per_node', processes]
    if 'ACCELERATE_DYNAMO_BACKEND' in os.environ:  # accelerate launch always sets it
        return ['accelerate', 'launch', *(['--mixed_precision', precision] if setting else [])]
    return [*setting, sys.orig_argv[0]]


def resume_command(script: str, folder: Path) -> str:
    """Return the command that continues the run in this folder, with the launcher of this run."""
    return shlex.join([*launcher(), os.path.relpath(script), '--resume', str(folder)])
