"""Turn SIGINT and SIGTERM into a request that a training loop checks between its steps."""
import ctypes
import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Optional

__all__ = ['StopRequest', 'Interrupted']

_logger = logging.getLogger(__name__)


class Interrupted(RuntimeError):
    """A signal stopped the run at a point from which it can continue.

    Args:
        signal_number: The signal.
    """

    def __init__(self, signal_number: int):
        super().__init__(f'stopped by {signal.Signals(signal_number).name}')
        self.signal_number = signal_number


class StopRequest:
    """Context manager that stores the first SIGINT or SIGTERM. The same signal again, after a second, stops at once."""

    signals = signal.SIGINT, signal.SIGTERM

    def __init__(self):
        self.signal_number: Optional[int] = None
        self._process = os.getpid()
        self._since = 0.
        self._before = {}

    def __enter__(self) -> 'StopRequest':
        _follow_launcher()
        # Python allows signal handlers only in the main thread
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.signals}
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if os.getpid() != self._process:  # a loader worker that inherited the handler; its parent ends it
            if number == signal.SIGTERM:
                os._exit(0)
            return
        if self.signal_number is None:
            self.signal_number, self._since = number, time.monotonic()
            _logger.warning(
                f'{signal.Signals(number).name}: saving and stopping after this step; once more stops at once.')
        elif number == self.signal_number and time.monotonic() - self._since > 1:
            raise KeyboardInterrupt


def _follow_launcher() -> None:
    """Request SIGTERM for this process when `accelerate launch` ends, which does not pass signals on (Linux only)."""
    try:
        command = Path(f'/proc/{os.getppid()}/cmdline').read_bytes().split(b'\0')
    except OSError:
        return
    if any(part.endswith((b'/accelerate', b'accelerate.commands.launch', b'accelerate_cli.py')) for part in command):
        ctypes.CDLL(None).prctl(1, int(signal.SIGTERM), 0, 0, 0)  # PR_SET_PDEATHSIG
