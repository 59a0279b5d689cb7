"""Change the class of a module in place to a subclass of it. Name, parameters, hooks and settings stay."""
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Dict, Tuple, Type, cast

import torch.nn as nn

__all__ = ['Mixin', 'TimmMixin', 'mixed_class', 'new_mixed', 'mix_in', 'take_out']


if TYPE_CHECKING:
    _Base = nn.Module  # the base that a mixin has in the mixed class
else:
    _Base = object


class Mixin(_Base):
    """Base of mixins that are put in front of a module's own class.

    The resulting class has no importable name. Copies and pickles rebuild it from its two bases.

    Attributes:
        mixed: The mixin and the module's own class.
    """
    mixed: ClassVar[Tuple[type, Type[nn.Module]]]

    @classmethod
    def class_name(cls, base: Type[nn.Module]) -> str:
        """Return the name of the class that results from this mixin and `base`."""
        return base.__name__

    @classmethod
    def class_attributes(cls, base: Type[nn.Module]) -> Dict[str, Any]:
        """Return further attributes of the class that results from this mixin and `base`."""
        return {}

    def __reduce_ex__(self, protocol: Any) -> Tuple[Any, ...]:
        state = self.__getstate__() if hasattr(self, '__getstate__') else self.__dict__
        return new_mixed, self.mixed, state


if TYPE_CHECKING:
    class TimmMixin(Mixin):
        """Mixin for a timm model, whose methods it calls by super()."""
        def forward_features(self, *args: Any, **kwargs: Any) -> Any: ...
        def forward_head(self, *args: Any, **kwargs: Any) -> Any: ...
        def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any: ...
        def reset_classifier(self, *args: Any, **kwargs: Any) -> None: ...
else:
    TimmMixin = Mixin


@lru_cache(maxsize=None)
def mixed_class(mixin: Type[Any], base: Type[Any]) -> Type[Any]:
    """Return the class (mixin, base). It is cached per pair, so that isinstance and pickling work."""
    attributes: Dict[str, Any] = {'__module__': base.__module__, 'mixed': (mixin, base), **mixin.class_attributes(base)}
    return type(mixin.class_name(base), (mixin, base), attributes)


def new_mixed(mixin: Type[Mixin], base: Type[nn.Module]) -> nn.Module:
    """Create an empty instance, for copies and pickles."""
    cls: Any = mixed_class(cast(Any, mixin), cast(Any, base))  # mypy: a class of modules is not Hashable
    return cls.__new__(cls)


def mix_in(module: nn.Module, mixin: Type[Mixin]) -> None:
    """Put a mixin in front of a module's class, in place. Nothing is changed if it is there already.

    Raises:
        TypeError: mixin is no subclass of Mixin.
    """
    if not (isinstance(mixin, type) and issubclass(mixin, Mixin)):
        raise TypeError(f'{mixin!r} is no subclass of timm_sscl.class_swap.Mixin, which copies and pickles need.')
    if not isinstance(module, mixin):
        module.__class__ = mixed_class(cast(Any, mixin), cast(Any, type(module)))


def take_out(module: nn.Module, mixin: Type[Mixin]) -> None:
    """Undo mix_in, in place, if the mixin is the first of the module's class."""
    if getattr(type(module), 'mixed', (None,))[0] is mixin:
        module.__class__ = cast(Any, type(module)).mixed[1]
