import gc
import logging
import os
import sys
from pathlib import Path

import pytest
import torch
from timm.layers import set_reentrant_ckpt, use_reentrant_ckpt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for `import train`, which is a script at the top and not part of the package

# These tensors are too small to share, and one thread sums in one order; also in processes that tests start.
torch.set_num_threads(1)
os.environ.setdefault('OMP_NUM_THREADS', '1')


def pytest_addoption(parser):
    parser.addoption(
        '--plugin', action='append', default=[], metavar='FILE|MODULE',
        help='import a plug-in first: tests of every neuron, norm, residual and loss then run for what it registers')


def pytest_configure(config):
    """Import the plug-ins before the files are collected, which list what is registered."""
    from timm_sscl.training.command_line.plugins import describe_failure, import_plugin
    for source in config.getoption('--plugin'):
        try:
            import_plugin(source)
        except FileNotFoundError as error:
            raise pytest.UsageError(f'--plugin: {error}') from error
        except Exception as error:
            raise pytest.UsageError(f'--plugin {describe_failure(source, error)}') from error


def pytest_xdist_auto_num_workers(config):
    """Workers of `-n auto`: one per core for folders, four at most; none for single files, which start sooner alone."""
    if 'PYTEST_XDIST_AUTO_NUM_WORKERS' in os.environ:
        return None  # pytest-xdist reads it
    folders = [arg for arg in config.args if Path(config.invocation_params.dir, arg.split('::')[0]).is_dir()]
    return min(len(os.sched_getaffinity(0)), 4) if folders else 0


def pytest_collection_finish():
    """Keep what is there now out of the garbage collector's way: tests that ask it what is alive call it often."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    """Run the files with slow tests first, so that workers end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker('slow')}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _logging_as_it_was():
    """train.py sets up logging for its process, which here is the tests'."""
    root = logging.getLogger()
    level, known = root.level, set(root.handlers)
    yield
    root.setLevel(level)
    for handler in set(root.handlers) - known:
        if type(handler) is logging.StreamHandler:  # not pytest's own
            root.removeHandler(handler)


@pytest.fixture(autouse=True)
def _one_thread():
    """train.py sets its process's number of threads, which here is the tests'."""
    yield
    torch.set_num_threads(1)


@pytest.fixture
def set_reentrant():
    """timm's switch between the two kinds of gradient checkpointing, back to where it was after the test."""
    before = use_reentrant_ckpt()
    yield set_reentrant_ckpt
    set_reentrant_ckpt(before)


@pytest.fixture(autouse=True)
def _registered_as_before():
    """What a test registers is gone after it."""
    from timm_sscl import conversion, data, losses, neurons
    registries = ((data.list_datasets, data.unregister_dataset), (losses.list_losses, losses.unregister_loss),
                  (neurons.list_neurons, neurons.unregister_neuron),
                  (neurons.list_surrogates, neurons.unregister_surrogate))
    before, variants = [set(names()) for names, _ in registries], set(conversion.list_variants())
    yield
    for variant in set(conversion.list_variants()) - variants:
        conversion.unregister_variant(*variant.split('/', 1))
    for (names, unregister), known in zip(registries, before):
        for name in set(names()) - known:
            unregister(name)
