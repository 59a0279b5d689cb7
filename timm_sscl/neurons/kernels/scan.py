"""Run the recursion over time of any neuron from its step."""
from functools import partial
from typing import Any, Callable, Hashable, Optional, Tuple

import torch

from timm_sscl.neurons.contract import check_stepped
from timm_sscl.neurons.surrogate import spike

from .backend import run
from .recursion import membrane_dtype

__all__ = ['scan', 'settings_at']

State = Tuple[torch.Tensor, ...]
Step = Callable[[torch.Tensor, State, State, int, Any], Tuple[torch.Tensor, State]]


def scan(
        step: Step,
        x: torch.Tensor,
        gain: Optional[torch.Tensor],
        state: State,
        constants: State,
        settings: Any,
        key: Hashable = None,
        progress: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Run a neuron's step over T timesteps, through torch.compile when worthwhile. Autograd computes the gradient.

    Args:
        step: Pure function (x_t, state, constants, t, settings) -> (output_t, state), the same object at every call.
        x: Input current, (T, ...).
        gain: Factor on x that broadcasts against a timestep; None is 1.
        state: Initial state.
        constants: Tensors that are the same at every timestep, including learnable ones.
        settings: Hashable settings; step and settings are constants of the compiled code.
        key: Further value on which the compiled code depends.
        progress: For a surrogate that changes during training, the fraction of the training that is done, 0-d; else
            None.

    Returns:
        Output, (T, ...), in x's dtype. Half precision is integrated in float32.
    """
    tensors = x, gain, tuple(state), tuple(constants), progress
    return run(_scan, tensors, x.shape[0], step, settings, key, owner=step)


class _SettingsNow:
    """A neuron's settings at one time of the training, for a surrogate that changes during it."""

    def __init__(self, settings: Any, progress: torch.Tensor):
        self.settings = settings
        self.surrogate_function = partial(settings.surrogate_function, progress=progress)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.settings, name)

    def spike(self, u: torch.Tensor, v_threshold: Any) -> torch.Tensor:
        return spike(u, v_threshold, self.surrogate_function)


def settings_at(settings: Any, progress: Optional[torch.Tensor], dtype: torch.dtype) -> Any:
    """Return settings whose `spike` uses the surrogate at this progress; unchanged if progress is None."""
    return settings if progress is None else _SettingsNow(settings, progress.to(dtype))


def _scan(
        x: torch.Tensor,
        gain: Optional[torch.Tensor],
        state: State,
        constants: State,
        progress: Optional[torch.Tensor],
        timesteps: int,
        step: Step,
        settings: Any,
        key: Hashable,
) -> torch.Tensor:
    dtype, outputs = membrane_dtype(x.dtype), []
    constants = tuple(c.to(dtype) for c in constants)
    state = tuple(s.to(dtype) for s in state)
    settings = settings_at(settings, progress, dtype)
    for t in range(timesteps):
        x_t = x[t].to(dtype)
        stepped = step(x_t if gain is None else x_t * gain.to(dtype), state, constants, t, settings)
        check_stepped(step, stepped)
        output, state = stepped
        outputs.append(output.to(x.dtype))
    return torch.stack(outputs)
