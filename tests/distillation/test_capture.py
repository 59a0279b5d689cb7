"""A training step can be captured in a CUDA graph: state changes in place, no index passes from the host."""
import pytest
import timm
import torch
from torch.overrides import TorchFunctionMode

import timm_sscl  # noqa: F401  registers the spiking_ names
from timm_sscl import SSCLTask, list_losses, list_neurons, list_variants
from timm_sscl.neurons import neuron_class

NORMS = [name.partition('/')[2] for name in list_variants() if name.startswith('norm/')]


def _tensors(module):
    """Return all parameters and buffers with their addresses."""
    return {name: (tensor, tensor.data_ptr()) for name, tensor in [*module.named_parameters(), *module.named_buffers()]}


def _check_in_place(module, step, parameters):
    """Check that steps neither replace a tensor nor move it, and that they do change some."""
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    before, values = _tensors(module), [p.detach().clone() for p in module.parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        step()
        optimizer.step()
    after = _tensors(module)
    assert after.keys() == before.keys()
    moved = [name for name in after if after[name][0] is not before[name][0] or after[name][1] != before[name][1]]
    assert not moved
    if values:
        assert any((a != b).any() for a, b in zip(values, module.parameters()))


class _NoIndexFromHost(TorchFunctionMode):
    """Refuse an index that is a list: it is copied from the host to the device at every call."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, '__name__', '') == '__getitem__':
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(i, list) for i in index), f'index {args[1]} is a list'
        return func(*args, **(kwargs or {}))


def _batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, 32, 32, generator=generator), torch.arange(6) % 5


def _student(**options):
    torch.manual_seed(0)
    return timm.create_model('spiking_test_resnet', num_classes=5, timesteps=2, **options)


def test_losses_change_their_state_in_place():
    teacher = timm.create_model('test_resnet', num_classes=5)
    task = SSCLTask(
        _student(), teacher, dict.fromkeys(list_losses(), 1.), input_size=(3, 32, 32), verbose=False, num_samples=6,
        loss_options={'sscl': dict(queue_size=8, weighting='uncertainty')}).train()
    task.set_progress(0.5)
    x, y = _batch()

    def step():
        with _NoIndexFromHost():
            task(x, y, index=torch.arange(6))['loss'].backward()

    _check_in_place(task, step, task.trainable_module.parameters())
    running = task.trainable_module.losses['sscl'].running_cka[0]
    assert running.mean_weight > 0  # it was followed
    assert task.trainable_module.losses['sscl'].queue_filled == 8


@pytest.mark.parametrize('name', list_neurons())
def test_neurons_change_their_state_in_place(name):
    cls = neuron_class(name)
    neuron = cls(2, channels=(3, 1, 1)) if cls.needs_channels else cls(2)
    x = _batch()[0].flatten(0, 1)[:12].view(4, 3, 32, 32).clone().requires_grad_()

    def step():
        with _NoIndexFromHost():
            (neuron(x) * x.detach()).sum().backward()

    neuron.train()
    _check_in_place(neuron, step, [*neuron.parameters(), torch.nn.Parameter(torch.zeros(1))])


@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('timesteps', [2, 3])
def test_norms_change_their_state_in_place(norm, timesteps):
    model = _student(norm=norm).train()
    model.set_timesteps(timesteps)  # parameters per timestep: of 2
    x, y = _batch()

    def step():
        with _NoIndexFromHost():
            torch.nn.functional.cross_entropy(model(x), y).backward()

    _check_in_place(model, step, model.parameters())
    with _NoIndexFromHost(), torch.no_grad():
        assert model.eval()(x).isfinite().all()


def test_the_mode_sees_indices_from_the_host():
    with _NoIndexFromHost():
        assert torch.arange(3)[1:].tolist() == [1, 2]
        with pytest.raises(AssertionError, match='is a list'):
            torch.arange(3)[[0, 1]]
