import logging
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for `import train`, which is a script at the top and not part of the package

os.environ.setdefault('OMP_NUM_THREADS', '2')


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
    """These tensors are too small to share, and one thread sums in one order; train.py sets its process's number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _registered_as_before():
    """What a test registers is gone after it."""
    from timm_sscl import losses, neurons
    registries = ((losses.list_losses, losses.unregister_loss), (neurons.list_neurons, neurons.unregister_neuron),
                  (neurons.list_surrogates, neurons.unregister_surrogate))
    before = [set(names()) for names, _ in registries]
    yield
    for (names, unregister), known in zip(registries, before):
        for name in set(names()) - known:
            unregister(name)
