"""Register variants by kind and name with a decorator, and create them."""
from typing import Any, Callable, Dict, List, Optional, Type, Union

from timm_sscl.closest import closest
from timm_sscl.named import Registry

from .base import Variant

__all__ = ['KINDS', 'register_variant', 'unregister_variant', 'list_variants', 'variant_name', 'create_variant',
           'check_registered']

KINDS = 'residual', 'stem_pool', 'norm', 'stem'  # in the order in which they are applied to a model

_variants: Dict[str, Registry[Type[Variant]]] = {kind: Registry(kind) for kind in KINDS}


def _registry(kind: str) -> Registry[Type[Variant]]:
    """Return the registry of a kind of variants.

    Raises:
        ValueError: The kind is unknown.
    """
    if kind not in _variants:
        raise ValueError(f"unknown kind of variant '{kind}'; there are {', '.join(KINDS)}.")
    return _variants[kind]


def register_variant(kind: str, name: str) -> Callable[[Type[Variant]], Type[Variant]]:
    """Decorator that registers a subclass of Variant: `norm=NAME`, `train.py --norm NAME` for the kind 'norm'.

    Args:
        kind: 'norm', 'residual', 'stem_pool' or 'stem'.
        name: Name of the variant.

    Raises:
        TypeError: The decorated object is not a subclass of Variant.
        ValueError: The kind is unknown, or the name is taken.
    """
    registry = _registry(kind)

    def decorate(cls: Type[Variant]) -> Type[Variant]:
        if not (isinstance(cls, type) and issubclass(cls, Variant)):
            raise TypeError(f"register_variant('{kind}', '{name}'): {cls!r} is no subclass of Variant.")
        return registry.register(name, cls)

    return decorate


def unregister_variant(kind: str, name: str) -> None:
    """Remove a variant."""
    _registry(kind).unregister(name)


def list_variants(kind: Optional[str] = None) -> List[str]:
    """Return the names of the registered variants of a kind; without a kind, of all kinds as 'norm/tdbn'."""
    if kind is None:
        return [f'{kind}/{name}' for kind in KINDS for name in _variants[kind]]
    return _registry(kind).names()


def check_registered(kind: str, name: Any) -> None:
    """Raise ValueError if no variant of this kind has the name."""
    names = _registry(kind).names()
    if name not in names:
        known = ', '.join(map(repr, names)) or 'registered first; there is none'
        close = closest(str(name), names)
        hint = f" Did you mean '{close[0]}'?" if close else ''
        raise ValueError(f"{kind}={name!r}: must be {known}, or None for the model's own. A plug-in may register "
                         f'others.{hint}')


def variant_name(kind: str, variant: Union[str, Type[Variant]]) -> str:
    """Return the registered name of a variant.

    Raises:
        ValueError: It is not registered.
    """
    if isinstance(variant, type):
        return _registry(kind).name_of(variant)
    check_registered(kind, variant)
    return variant


def create_variant(kind: str, name: str, **settings: Any) -> Variant:
    """Create a variant by its kind and name.

    Args:
        kind: 'norm', 'residual', 'stem_pool' or 'stem'.
        name: Registered name.
        settings: Fields of the variant's Settings.

    Raises:
        ValueError: The name or a setting is unknown, or a value is out of range.
    """
    check_registered(kind, name)
    variant = _registry(kind).get(name)(**settings)
    variant.kind, variant.name = kind, name
    return variant
