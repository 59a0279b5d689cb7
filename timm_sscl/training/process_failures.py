"""Recognise errors that are caused by the end of another process: a loader worker, or a process of the same run."""
import re
from typing import Optional

import torch.distributed as dist

__all__ = ['ProcessDied', 'as_process_failure']

_WORKER = re.compile(r'DataLoader worker \(pid\(?s?\)? ?[\d, ]+\) (is killed by signal: [^.]*|exited unexpectedly)')
_CONNECTION = re.compile(
    r'Connection (closed|reset) by peer|Broken pipe|Socket closed|Timed out waiting|gloo/transport|NCCL (communicator|'
    r'error)|remote process exited|Connection refused', re.I)


class ProcessDied(RuntimeError):
    """A process that this one depends on has ended."""


def as_process_failure(error: BaseException, processes: int) -> Optional[ProcessDied]:
    """Return a ProcessDied that says which process ended; None if the error has another cause.

    Args:
        error: Exception raised by a training.
        processes: Number of processes of the run.
    """
    if not isinstance(error, (RuntimeError, OSError)):
        return None
    text = str(error)
    worker = _WORKER.search(text)
    # the launcher terminates the remaining processes of a run
    if worker and processes > 1 and 'Terminated' in worker.group(1):
        return ProcessDied('the launcher stopped this process (SIGTERM), since another process of the run has ended.')
    if worker:
        how = worker.group(1).replace('is killed by signal: ', 'killed by the signal ')
        return ProcessDied(f'a worker of the data loader died ({how}); where memory ran out, fewer --workers or a '
                           f'smaller --batch-size help.')
    if processes > 1 and (isinstance(error, dist.DistError) or _CONNECTION.search(text)):
        return ProcessDied('another process of the run has ended; its own message, where it left one, says why.')
    return None
