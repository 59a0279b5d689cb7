"""Progress line of a training: redrawn in place on a terminal, else logged from time to time."""
import logging
import sys
import time
from typing import Callable, Optional, TextIO

__all__ = ['ProgressLine']

_logger = logging.getLogger('train')
_ERASE = '\r\x1b[K'


class ProgressLine:
    """One line about a running loop.

    Args:
        enabled: Whether this process shows anything.
        stream: Stream that may be a terminal, sys.stderr by default.
        seconds: Minimum time between two redraws on a terminal.
    """

    def __init__(self, enabled: bool, stream: Optional[TextIO] = None, seconds: float = 0.5):
        self.enabled = enabled
        self.stream = sys.stderr if stream is None else stream
        self.live = enabled and self.stream.isatty()
        self.seconds = seconds
        self._drawn = 0.

    def update(self, text: Callable[[], str], due: bool, last: bool = False) -> None:
        """Show the line after a step, if it is due.

        Args:
            text: Function that returns the line; called only if it is shown.
            due: Whether to log a line now if there is no terminal.
            last: Whether the loop ends here; the line then stays.
        """
        if not self.enabled:
            return
        now = time.monotonic()
        if self.live and (last or now - self._drawn >= self.seconds):
            self._drawn = now
            self.stream.write(_ERASE + ('' if last else text()))
            self.stream.flush()
        if last or (due and not self.live):
            _logger.info(text())
