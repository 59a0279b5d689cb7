"""Surrogate gradients of the Heaviside step, by name."""
import functools
import inspect
from typing import Any, Callable, List, Tuple, Union

import torch

from timm_sscl.named import Registry

__all__ = ['Surrogate', 'rectangle_window', 'spike', 'resolve_surrogate', 'register_surrogate', 'unregister_surrogate',
           'list_surrogates', 'surrogate_name']

Surrogate = Callable[[torch.Tensor, Any], torch.Tensor]  # (potential, threshold) -> dO/dU

_surrogates: Registry[Surrogate] = Registry('surrogate')


def register_surrogate(name: str) -> Callable[[Surrogate], Surrogate]:
    """Decorator that registers a surrogate gradient under a name.

    What is decorated is a function h(u, v_threshold, **options) of the potential before the reset, any shape, and the
    threshold (a float, or a tensor that broadcasts). It returns dO/dU in u's shape: floating point, or boolean where it
    is 0 or 1. Its options are keyword arguments with defaults.

    Raises:
        ValueError: The name is taken.
    """
    return lambda function: _surrogates.register(name, function)


def unregister_surrogate(name: str) -> None:
    """Remove a surrogate."""
    _surrogates.unregister(name)


def list_surrogates() -> List[str]:
    """Names of the registered surrogates."""
    return _surrogates.names()


def resolve_surrogate(surrogate: Union[str, Surrogate], options: Tuple[Tuple[str, Any], ...] = ()) -> Surrogate:
    """The surrogate of a name, or a function itself, with its options bound; the same object for the same arguments.

    Args:
        surrogate: Registered name, or function.
        options: Pairs of an option's name and its value.

    Raises:
        ValueError: The name is unknown, or the surrogate has no such option.
    """
    function = _surrogates.get(surrogate) if isinstance(surrogate, str) else surrogate
    if not callable(function):
        raise ValueError(f'surrogate={surrogate!r}: must be a registered name or a function h(u, v_threshold).')
    return _bound(function, options) if options else function


@functools.lru_cache(maxsize=None)
def _bound(function: Surrogate, options: Tuple[Tuple[str, Any], ...]) -> Surrogate:
    try:
        inspect.signature(function).bind(None, None, **dict(options))
    except TypeError as error:
        name = getattr(function, '__name__', repr(function))
        known = list(inspect.signature(function).parameters)[2:]
        raise ValueError(f"surrogate '{name}': {error}; its options are {', '.join(known) or 'none'}.") from error
    return functools.partial(function, **dict(options))


def surrogate_name(surrogate: Union[str, Surrogate]) -> str:
    """The name that a surrogate is registered under.

    Raises:
        ValueError: It is not registered.
    """
    if isinstance(surrogate, str):
        _surrogates.get(surrogate)
        return surrogate
    return _surrogates.name_of(surrogate)


def spike(u: torch.Tensor, v_threshold: Any, surrogate: Surrogate) -> torch.Tensor:
    """1 where u >= v_threshold, else 0, exactly; its gradient is the surrogate by u, and minus it by v_threshold.

    Args:
        u: Potential before the reset, finite, any shape.
        v_threshold: Threshold, a float or a tensor that broadcasts against u; it may be learnable.
        surrogate: h(u, v_threshold).

    Returns:
        Spikes of u's shape and dtype.
    """
    distance = u - v_threshold
    fired = (distance >= 0).to(u.dtype)
    threshold = v_threshold.detach() if isinstance(v_threshold, torch.Tensor) else v_threshold
    slope = surrogate(u.detach(), threshold).to(u.dtype)
    return fired.detach() + slope * (distance - distance.detach())


@register_surrogate('rectangle')
def rectangle_window(u: torch.Tensor, v_threshold: float) -> torch.Tensor:
    """Closed rectangle, Eq. 21 of the SSCL paper: dO/dU = 1 if 0 <= U <= 2 * v_threshold, else 0.

    Both ends belong to the window. An input of exactly 0 is common (ReLU, padding, empty event frames) and gives U = 0,
    which an open window would leave without a gradient.

    Args:
        u: Membrane potential before the reset, any shape.
        v_threshold: Firing threshold; the window is centred on it.

    Returns:
        Boolean tensor of u's shape, True where the gradient passes.
    """
    return (u >= 0) & (u <= 2 * v_threshold)


@register_surrogate('triangle')
def triangle(u: torch.Tensor, v_threshold: float, gamma: float = 1.) -> torch.Tensor:
    """Triangle of unit area, as in TET and TEBN: dO/dU = max(gamma - |U - v_threshold|, 0) / gamma^2."""
    return (gamma - (u - v_threshold).abs()).clamp(min=0) / gamma ** 2
