"""Errors of torch that mean that a process has died are told apart from all others."""
import pytest

from timm_sscl.training.process_failures import as_process_failure


def test_worker_that_is_killed():  # test_processes.py kills one
    error = RuntimeError('DataLoader worker (pid 30116) is killed by signal: Killed. ')
    for processes in (1, 2):
        text = str(as_process_failure(error, processes))
        assert 'a worker of the data loader died (killed by the signal Killed' in text and '--workers' in text
    error = RuntimeError('DataLoader worker (pid(s) 12, 13) exited unexpectedly')
    assert 'a worker of the data loader died (exited unexpectedly' in str(as_process_failure(error, 1))


@pytest.mark.parametrize('text', [
    '[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:2532',
    'Application timeout caused pair closure at gloo/transport/tcp/unbound_buffer.cc',
    'NCCL error in: ProcessGroupNCCL.cpp, remote process exited or there was a network error'])
def test_lost_connection_is_another_process_of_several(text):
    assert 'another process of the run has ended' in str(as_process_failure(RuntimeError(text), 2))
    assert as_process_failure(RuntimeError(text), 1) is None


@pytest.mark.parametrize('error', [
    RuntimeError('mat1 and mat2 shapes cannot be multiplied'), KeyError('gloo/transport'), ValueError('x')])
def test_other_errors_keep_their_traceback(error):
    assert as_process_failure(error, 2) is None


def test_worker_that_the_launcher_ended():
    error = RuntimeError('DataLoader worker (pid 12) is killed by signal: Terminated. ')
    assert 'since another process of the run has ended' in str(as_process_failure(error, 2))
    assert 'a worker of the data loader died' in str(as_process_failure(error, 1))
