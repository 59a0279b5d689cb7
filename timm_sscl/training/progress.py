"""The line that says how far a training is: redrawn in place on a terminal, logged now and then without one."""
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
        stream: Where a terminal would be, sys.stderr by default.
        seconds: A terminal's line is redrawn no more often than this.
    """

    def __init__(self, enabled: bool, stream: Optional[TextIO] = None, seconds: float = 0.5):
        self.enabled = enabled
        self.stream = sys.stderr if stream is None else stream
        self.live = enabled and self.stream.isatty()
        self.seconds = seconds
        self._drawn = 0.

    def update(self, text: Callable[[], str], due: bool, last: bool = False) -> None:
        """After a step.

        Args:
            text: Makes the line; called only where it is shown.
            due: Whether a log without a terminal gets a line now.
            last: Whether the loop ends here, so that the line stays.
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
