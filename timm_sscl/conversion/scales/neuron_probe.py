"""Run a neuron on noise before a conversion, and compare it with what its class says of itself."""
import logging
from typing import Any, List

import torch
from torch.utils._python_dispatch import _disable_current_modes

from timm_sscl.neurons import SpikingNeuron

__all__ = ['probe_neuron']

_logger = logging.getLogger(__name__)

_SAMPLES = 16


def probe_neuron(settings: Any) -> None:
    """Check the surrogate's values and, for a neuron that is not this package's, its output and its gradient.

    The random generators are left as they were. A neuron that does not run on noise of shape (T * 16, 3, 2, 2) is not
    checked further.

    Args:
        settings: SpikingSettings.

    Raises:
        ValueError: The surrogate is not finite, or the output has values that its class's `output` does not have.
    """
    with _disable_current_modes(), torch.device('cpu'), torch.random.fork_rng(devices=[]), \
            torch.inference_mode(False), torch.enable_grad():
        try:
            neuron = settings.new_neuron()
            slope = _slope(neuron)
            out = None if type(neuron).__module__.startswith('timm_sscl.') else _run(neuron)
        except Exception:  # what is wrong for this input may be right for the model's; a real call raises
            return
        if slope is not None and not slope.isfinite().all():
            options = ', '.join(f'{name}={value}' for name, value in settings.surrogate_kwargs)
            raise ValueError(f"surrogate '{settings.surrogate}' with {options or 'its defaults'}: its values are not "
                             f'finite; the gradient would be nan.')
        if out is not None:
            _check_levels(settings.neuron, neuron, out)
            _report_untrained(settings.neuron, neuron, out)


def _slope(neuron: SpikingNeuron) -> Any:
    """Return the surrogate at potentials around a threshold of 0.5; None if it changes with the training."""
    function = neuron.settings.surrogate_function
    if function is None or neuron.settings.follows_progress:
        return None
    return function(torch.linspace(-1., 2., 7), .5).double()


def _run(neuron: SpikingNeuron) -> torch.Tensor:
    if neuron.needs_channels:
        neuron.set_channels((3, 1, 1))
    noise = torch.randn(neuron.timesteps * _SAMPLES, 3, 2, 2, dtype=torch.float64)
    return neuron.double()((2 * neuron.threshold() * noise).requires_grad_())


def _check_levels(name: str, neuron: SpikingNeuron, out: torch.Tensor) -> None:
    if neuron.output == 'analog':
        return
    unit = neuron.unit()
    levels = out.detach() if unit is None else (out / unit).detach()
    low, high = {'binary': (0, 1), 'ternary': (-1, 1)}.get(neuron.output, (0, neuron.top))
    wrong = levels[(levels - levels.round().clamp(low, high)).abs() > 1e-6]  # float64: far above its rounding
    if wrong.numel():
        raise ValueError(f"neuron '{name}' says output='{neuron.output}', whole numbers from {low} to {high}, and "
                         f"returned {wrong[0].item():.4g}; firing rates would be wrong. Set output = 'analog' in its "
                         f'class, or have it return whole numbers.')


def _report_untrained(name: str, neuron: SpikingNeuron, out: torch.Tensor) -> None:
    """Warn of parameters that the output does not depend on."""
    own = [(key, parameter) for key, parameter in neuron.named_parameters() if parameter.requires_grad]
    grads: List[Any] = [None] * len(own)
    if own and out.requires_grad:
        grads = list(torch.autograd.grad(out.sum(), [parameter for _, parameter in own], allow_unused=True))
    untrained = [key for (key, _), grad in zip(own, grads) if grad is None]
    if untrained:
        _logger.warning(f"neuron '{name}': no gradient reaches {', '.join(untrained)}, which will not train; what the "
                        f'step reads of a parameter must be among what `constants` returns.')
