import io
import logging

import pytest

from timm_sscl.training.steps.progress import ProgressLine


class Terminal(io.StringIO):
    def isatty(self):
        return True


def steps(line, n=6, every=2):
    made = []

    def text(step):
        made.append(step)
        return f'step {step}'

    for step in range(1, n + 1):
        line.update(lambda: text(step), due=step % every == 0, last=step == n)
    return made


def test_terminal_gets_one_line_redrawn_in_place_and_the_last_stays(caplog):
    stream = Terminal()
    with caplog.at_level(logging.INFO):
        steps(ProgressLine(True, stream, seconds=0))
    assert '\n' not in stream.getvalue() and stream.getvalue().count('\r') == 6
    assert stream.getvalue().endswith('\r\x1b[K')  # erased, before the last is logged
    assert [r.message for r in caplog.records] == ['step 6']


def test_terminal_is_not_redrawn_at_every_step():
    stream = Terminal()
    steps(ProgressLine(True, stream, seconds=1000))
    assert stream.getvalue().count('step') <= 1


@pytest.mark.parametrize('enabled, logged', [(True, ['step 2', 'step 4', 'step 6']), (False, [])])
def test_without_a_terminal_lines_are_logged_and_other_processes_are_quiet(enabled, logged, caplog):
    stream = io.StringIO()
    with caplog.at_level(logging.INFO):
        made = steps(ProgressLine(enabled, stream))
    assert stream.getvalue() == '' and [r.message for r in caplog.records] == logged
    assert len(made) == len(logged)
