"""Translate integrate-and-fire neurons to nodes of NIR and back.

NIR's LIF is tau dv/dt = v_leak - v + r I, which fires at v > v_threshold. An Euler step of size dt gives

    v_t = (1 - dt / tau) v_{t-1} + (dt / tau) (v_leak + r I_t)

Ours is U_t = decay U_{t-1} + gain X_t, which fires at U >= U_th. They agree for tau = dt / (1 - decay), r = tau / dt,
v_leak = v_reset = 0 and v_threshold = U_th / gain, except for a potential of exactly the threshold. NIR's IF is
dv/dt = r I, with r = 1 / dt.
"""
from typing import Any, Dict, NamedTuple, Tuple

import numpy as np
import torch

from timm_sscl.neurons import SpikingNeuron

from .extra import from_extra

__all__ = ['Leaky', 'Refused', 'neuron_node', 'read_neuron']


class Refused(ValueError):
    """A part of a network has no equal on the other side. The message is the reason."""


class Leaky(NamedTuple):
    """A layer of neurons with a hard reset to 0: U_t = decay * U_{t-1} + gain * X_t."""
    decay: float  # 1 does not leak
    v_threshold: float
    gain: float


def neuron_node(neuron: SpikingNeuron, shape: Tuple[int, ...], dt: float, folds: Dict[str, str]) -> Any:
    """Return the NIR node of a neuron layer.

    Args:
        neuron: The layer.
        shape: Shape of a sample of it.
        dt: Length of a timestep in seconds.
        folds: Factor ('scale', ...) -> why `fold_gains` left it in the neuron.

    Raises:
        Refused: NIR or the tools that read it have no equal.
    """
    nir: Any = from_extra('nir')
    layer = _leaky(neuron, folds)

    def full(value: float) -> np.ndarray:
        return np.full(shape, value, dtype=np.float64)  # float64: decay and gain are recovered exactly

    threshold = dict(v_threshold=full(layer.v_threshold / layer.gain), v_reset=full(0.))
    if layer.decay == 1:
        return nir.IF(r=full(1 / dt), **threshold)
    tau = dt / (1 - layer.decay)
    return nir.LIF(tau=full(tau), r=full(tau / dt), v_leak=full(0.), **threshold)


def _leaky(neuron: SpikingNeuron, folds: Dict[str, str]) -> Leaky:
    """Return what a neuron layer computes, if it is a Leaky.

    Raises:
        Refused: It is not.
    """
    if 'step_gain' in neuron._buffers:
        raise Refused('its current has a factor per timestep (fold_norms of TEBN); NIR has no node for it')
    lif = neuron.as_lif()
    if lif is None:
        raise Refused(f"{type(neuron).__name__} has no node in NIR; the neurons 'lif' and 'if' have one")
    if lif.v_reset is None:
        raise Refused("soft reset (v_reset=None): NIR's neurons have the hard reset alone")
    if lif.v_reset != 0:
        raise Refused(f'v_reset={lif.v_reset}: NIR has no initial potential, and the tools that read it take v_reset '
                      f'as the leak potential, too, or as 0')
    if lif.v_init != 0:
        raise Refused(f'v_init={lif.v_init}: NIR has no initial potential; every neuron starts at 0')
    unit = neuron.unit()
    if unit is not None and bool((unit != 1).any()):
        why = folds.get('scale') or folds.get('amplitude') or 'not folded'
        raise Refused(f'its spikes are multiplied by a scale or amplitude ({why}); NIR has spikes of 1 only')
    gain = 1. if neuron.gain is None else _one_value(neuron.gain, folds)
    return Leaky(float(lif.tau), float(lif.v_threshold), gain)


def _one_value(gain: torch.Tensor, folds: Dict[str, str]) -> float:
    """Return the gain of a layer."""
    values = gain.double().flatten()
    if bool((values != values[0]).any()):
        raise Refused(f"it has a gain per channel, that is thresholds per channel ({folds.get('gain', 'not folded')}); "
                      f"SpikingJelly's and snnTorch's importers take one threshold per layer")
    if not values[0] > 0:
        raise Refused(f'its gain is {values[0].item():.3g}: it would fire below its threshold')
    return values[0].item()


def read_neuron(node: Any, dt: float) -> Leaky:
    """Return what a node of NIR, IF or LIF, computes in timesteps of dt seconds.

    Raises:
        Refused: Our neuron has no equal.
    """
    kind = type(node).__name__
    values = {name: _uniform(name, getattr(node, name)) for name in ('r', 'v_threshold', 'v_reset')}
    if kind == 'LIF':
        values.update({name: _uniform(name, getattr(node, name)) for name in ('tau', 'v_leak')})
    for name in ('v_reset', 'v_leak'):
        if values.get(name):
            raise Refused(f'{name}={values[name]:g}: NIR has no initial potential, so that only 0 is read')
    if not values['v_threshold'] > 0 or not values['r'] > 0:
        raise Refused(f"v_threshold={values['v_threshold']:g}, r={values['r']:g}: both must be positive")
    if kind == 'IF':
        return Leaky(1., values['v_threshold'], _near_one(values['r'] * dt))
    if not values['tau'] >= dt * (1 - 1e-6):  # float32 rounding
        raise Refused(f"tau={values['tau']:g}: must be at least dt={dt:g}, else the potential overshoots")
    return Leaky(_decay(values['tau'], dt), values['v_threshold'], _near_one(values['r'] * dt / values['tau']))


def _uniform(name: str, value: Any) -> float:
    """Return the one value of a parameter."""
    unique = np.unique(np.asarray(value))
    if len(unique) != 1 or not np.isfinite(unique[0]):
        raise Refused(f'{name} differs between neurons or is not finite; a layer of ours has one value')
    return float(unique[0])


def _near_one(gain: float) -> float:
    """Return a gain; exactly 1 if it differs by float32 rounding only, since r is tau / dt rounded."""
    return 1. if abs(gain - 1) < 1e-6 else gain


def _decay(tau: float, dt: float) -> float:
    """Return the decay factor of a time constant: the shortest decimal number that has exactly this time constant."""
    raw = max(1 - dt / tau, 0.)
    for digits in range(1, 17):
        short = round(raw, digits)
        if short < 1 and dt / (1 - short) == tau:
            return short
    return raw
