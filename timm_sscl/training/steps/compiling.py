"""Count compilations and the time that they take, so that rates of a training leave it out."""
import logging
import time
from typing import Any, Optional

from torch._dynamo.callback import callback_handler

__all__ = ['CompileClock']

_logger = logging.getLogger('train')


class CompileClock:
    """Counts what torch.compile compiles inside the context, in all threads, and says so at the first time.

    The context may be entered again, one at a time.

    Args:
        what: What is compiled, for the message.

    Attributes:
        count: Number of compilations. One that causes others counts once.
        seconds: Time that they took.
    """

    def __init__(self, what: str = 'neurons for the training') -> None:
        self.what = what
        self.count = 0
        self.seconds = 0.
        self._began: Optional[float] = None

    def __enter__(self) -> 'CompileClock':
        callback_handler.register_start_callback(self._start)
        callback_handler.register_end_callback(self._end)
        return self

    def __exit__(self, *error: Any) -> None:
        callback_handler.remove_start_callback(self._start)
        callback_handler.remove_end_callback(self._end)

    def _start(self, *about: Any) -> None:
        if not self.count:
            _logger.info(f'Compiling {self.what}: some seconds, fewer where the compiler\'s cache has it. Images per '
                         f'second and the time left do not count them.')
        self.count += 1
        self._began = time.time()

    def _end(self, *about: Any) -> None:
        if self._began is not None:
            self.seconds += time.time() - self._began
        self._began = None
