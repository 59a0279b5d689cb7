"""The spike function, the registry of surrogate gradients, and the rectangle. Others are in `surrogate_shapes`."""
import functools
import inspect
from typing import Any, Callable, List, Optional, Tuple, Union

import torch

from timm_sscl.knobs import declared_type, read_value, type_hints
from timm_sscl.named import Registry

__all__ = ['Surrogate', 'rectangle_window', 'spike', 'resolve_surrogate', 'read_surrogate_options', 'follows_progress',
           'register_surrogate', 'unregister_surrogate', 'list_surrogates', 'surrogate_name']

Surrogate = Callable[..., torch.Tensor]  # (potential, threshold, options) -> dO/dU

_PROGRESS = 'progress'

_surrogates: Registry[Surrogate] = Registry('surrogate')


def register_surrogate(name: str) -> Callable[[Surrogate], Surrogate]:
    """Decorator that registers a surrogate gradient by name.

    Decorate a function h(u, v_threshold, **options) of the potential before the reset (any shape) and the threshold (a
    float, or a tensor that broadcasts). It treats every element by itself and returns dO/dU in u's shape: floating
    point, or boolean if the values are 0 and 1. Options are keyword arguments with defaults. A surrogate that changes
    during training has a further keyword argument `progress`, a 0-d tensor: the fraction of the training that is done,
    0 to 1 (`model.set_progress`).

    Raises:
        ValueError: The name is taken.
    """
    return lambda function: _surrogates.register(name, function)


def unregister_surrogate(name: str) -> None:
    """Remove a surrogate."""
    _surrogates.unregister(name)


def list_surrogates() -> List[str]:
    """Return the names of the registered surrogates."""
    return _surrogates.names()


def resolve_surrogate(surrogate: Union[str, Surrogate], options: Tuple[Tuple[str, Any], ...] = ()) -> Surrogate:
    """Return a surrogate, given by name or as a function, with its options bound. Equal arguments give the same object.

    Args:
        surrogate: Registered name, or function.
        options: (name, value) pairs.

    Raises:
        ValueError: The name is unknown, or the surrogate has no such option.
    """
    function = _surrogates.get(surrogate) if isinstance(surrogate, str) else surrogate
    if not callable(function):
        raise ValueError(f'surrogate={surrogate!r}: must be a registered name or a function h(u, v_threshold).')
    return _bound(function, options) if options else function


def read_surrogate_options(
        surrogate: Union[str, Surrogate],
        options: Tuple[Tuple[str, Any], ...],
) -> Tuple[Tuple[str, Any], ...]:
    """Return the options of a surrogate with every value read by its type.

    Args:
        surrogate: Registered name, or function.
        options: (name, value) pairs. One that the surrogate lacks is left to `resolve_surrogate`.

    Raises:
        ValueError: The name is unknown, or a value does not have its type.
    """
    function: Any = _surrogates.get(surrogate) if isinstance(surrogate, str) else surrogate
    if not options or not callable(function):
        return options
    parameters, hints = inspect.signature(function).parameters, type_hints(function)
    return tuple((name, read_value(declared_type(hints.get(name), parameters[name].default), value, name,
                                   parameters[name].default, f"surrogate '{_name_of(function)}'")
                  if name in parameters and name != _PROGRESS else value) for name, value in options)


@functools.lru_cache(maxsize=None)
def _bound(function: Surrogate, options: Tuple[Tuple[str, Any], ...]) -> Surrogate:
    """Bind options to a surrogate.

    Raises:
        ValueError: It has no such option.
    """
    signature = inspect.signature(function)
    try:
        signature.bind_partial(None, None, **dict(options))
        if _PROGRESS in dict(options):
            raise TypeError(f"'{_PROGRESS}' is set by the training")
    except TypeError as error:
        known = [option for option in list(signature.parameters)[2:] if option != _PROGRESS]
        raise ValueError(
            f"surrogate '{_name_of(function)}': {error}; its options are {', '.join(known) or 'none'}.") from error
    return functools.partial(function, **dict(options))


def follows_progress(surrogate: Surrogate) -> bool:
    """Return whether a surrogate changes during training, i.e. has an argument `progress`."""
    return _PROGRESS in inspect.signature(surrogate).parameters


def surrogate_name(surrogate: Union[str, Surrogate]) -> str:
    """Return the registered name of a surrogate.

    Raises:
        ValueError: It is not registered.
    """
    if isinstance(surrogate, str):
        _surrogates.get(surrogate)
        return surrogate
    return _surrogates.name_of(surrogate)


def spike(u: torch.Tensor, v_threshold: Any, surrogate: Surrogate) -> torch.Tensor:
    """Return 1 where u >= v_threshold, else 0. The gradient by u is the surrogate, by v_threshold minus the surrogate.

    Args:
        u: Potential before the reset, finite, any shape.
        v_threshold: Threshold, a float or a tensor that broadcasts against u; it may be learnable.
        surrogate: h(u, v_threshold).

    Returns:
        Spikes of u's shape and dtype.

    Raises:
        ValueError: The surrogate returned no tensor of that shape.
    """
    distance = u - v_threshold
    fired = (distance >= 0).to(u.dtype)
    threshold = v_threshold.detach() if isinstance(v_threshold, torch.Tensor) else v_threshold
    slope = surrogate(u.detach(), threshold)
    if not isinstance(slope, torch.Tensor) or slope.shape != distance.shape:
        raise ValueError(_wrong_slope(surrogate, slope, tuple(distance.shape)))
    return fired.detach() + slope.to(u.dtype) * (distance - distance.detach())


def _wrong_slope(surrogate: Surrogate, slope: Any, shape: Tuple[int, ...]) -> str:
    got = f'a tensor {tuple(slope.shape)}' if isinstance(slope, torch.Tensor) else f'a {type(slope).__name__}'
    return (f"surrogate '{_name_of(surrogate)}' returned {got}; it must return a tensor of the shape of the potential, "
            f'{shape}.')


def _name_of(surrogate: Surrogate) -> str:
    """Return the registered name of a surrogate, with or without bound options; else the name of the function."""
    function = getattr(surrogate, 'func', surrogate)
    names = [name for name in _surrogates if _surrogates.get(name) is function]
    return names[0] if names else getattr(function, '__name__', repr(function))


@register_surrogate('rectangle')
def rectangle_window(u: torch.Tensor, v_threshold: float, width: Optional[float] = None) -> torch.Tensor:
    """Closed rectangle, Eq. 21 of the SSCL paper: dO/dU = 1 if 0 <= U <= 2 * v_threshold, else 0.

    Both ends belong to the window. An input of exactly 0 is common (ReLU, padding, empty event frames) and gives U = 0,
    which would get no gradient from an open window.

    Args:
        u: Membrane potential before the reset, any shape.
        v_threshold: Firing threshold, the centre of the window.
        width: If given, use the open rectangle of unit area instead, as in GLIF, LTMD, MLF and STBP:
            1 / width if |U - v_threshold| < width / 2. SpikingJelly's Rect(1 / width).

    Returns:
        Tensor of u's shape: boolean for the closed rectangle, True where the gradient passes, else floating point.
    """
    if width is not None:
        return ((u - v_threshold).abs() < width / 2) / width
    return (u >= 0) & (u <= 2 * v_threshold)
