"""Run the recursion over time of any neuron from its step."""
from functools import partial
from typing import Any, Callable, Hashable, Iterator, List, Optional, Tuple

import torch

from timm_sscl.neurons.contract import check_stepped
from timm_sscl.neurons.surrogate import spike

from .backend import compiles, run
from .recompute import Kernel, recompute_applies, run_recomputed
from .recursion import membrane_dtype
from .settings_view import SettingsView

__all__ = ['Recursion', 'State', 'outputs', 'potentials', 'scan', 'settings_at']

State = Tuple[torch.Tensor, ...]
# (x, gain, state, constants, settings, key, progress), the arguments of scan after the step
Recursion = Tuple[torch.Tensor, Optional[torch.Tensor], State, State, Any, Hashable, Optional[torch.Tensor]]
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
        elementwise: bool = False,
) -> torch.Tensor:
    """Run a neuron's step over T timesteps, through torch.compile when worthwhile.

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
        elementwise: Whether the step treats every element by itself. If state and constants are scalars, the compiled
            code then saves only x, and its backward computes the rest again.

    Returns:
        Output, (T, ...), in x's dtype. Half precision is integrated in float32.
    """
    state, constants = tuple(state), tuple(constants)
    if elementwise and compiles(x, x.shape[0], step) and recompute_applies(x, state, constants):
        kernel = Kernel(_scan, (step, settings, key), step)
        return run_recomputed(kernel, x, gain, state, constants, progress)
    tensors = x, gain, state, constants, progress
    return run(_scan, tensors, x.shape[0], step, settings, key, owner=step)


def potentials(
        step: Step,
        x: torch.Tensor,
        gain: Optional[torch.Tensor],
        state: State,
        constants: State,
        settings: Any,
        key: Hashable = None,
        progress: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Return the potentials before the reset, divided by the threshold, (T, ...), at least float32. See `scan`.

    They are what the step passes to `settings.spike`.

    Raises:
        ValueError: The step does not call `settings.spike` once per timestep.
    """
    tensors = x, gain, tuple(state), tuple(constants), progress
    return run(_potentials, tensors, x.shape[0], step, settings, key, owner=step)


class _Watched(SettingsView):
    """A neuron's settings that store every potential, divided by its threshold."""

    def __init__(self, settings: Any):
        super().__init__(settings)
        self.seen: List[torch.Tensor] = []

    def spike(self, u: torch.Tensor, v_threshold: Any) -> torch.Tensor:
        self.seen.append(u / v_threshold)
        return self.settings.spike(u, v_threshold)


class _WithoutGradient(SettingsView):
    """A neuron's settings whose spikes have no gradient, so that the surrogate is not computed."""

    def spike(self, u: torch.Tensor, v_threshold: Any) -> torch.Tensor:
        return (u - v_threshold >= 0).to(u.dtype)


class _SettingsNow(SettingsView):
    """A neuron's settings at one time of the training, for a surrogate that changes during it."""

    def __init__(self, settings: Any, progress: torch.Tensor):
        super().__init__(settings)
        self.surrogate_function = partial(settings.surrogate_function, progress=progress)

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
        gradient: bool = True,
) -> torch.Tensor:
    settings = settings_at(settings, progress, membrane_dtype(x.dtype)) if gradient else _WithoutGradient(settings)
    return torch.stack([o.to(x.dtype) for o in outputs(x, gain, state, constants, step, settings)])


def _potentials(
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
    watched = _Watched(settings_at(settings, progress, membrane_dtype(x.dtype)))
    for _ in outputs(x, gain, state, constants, step, watched):
        pass
    if len(watched.seen) != timesteps:
        raise ValueError(f'{getattr(step, "__qualname__", step)} compares {len(watched.seen) / timesteps:g} potentials '
                         f'per timestep with a threshold by settings.spike, expected 1.')
    return torch.stack(watched.seen)


def outputs(
        x: torch.Tensor,
        gain: Optional[torch.Tensor],
        state: State,
        constants: State,
        step: Step,
        settings: Any,
) -> Iterator[torch.Tensor]:
    """Yield the output of every timestep in the membrane's dtype."""
    dtype = membrane_dtype(x.dtype)
    constants = tuple(c.to(dtype) for c in constants)
    state = tuple(s.to(dtype) for s in state)
    for t, x_t in enumerate(x.unbind(0)):  # the backward of indexing would add up T tensors of x's size
        x_t = x_t.to(dtype)
        stepped = step(x_t if gain is None else x_t * gain.to(dtype), state, constants, t, settings)
        check_stepped(step, stepped)
        output, state = stepped
        yield output
