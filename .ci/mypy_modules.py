"""mypy plugin: an attribute of a module that its class does not declare is Any, where torch says Tensor | Module."""
from typing import Callable, Optional, Type

from mypy.plugin import AttributeContext, Plugin
from mypy.types import AnyType, ProperType, TypeOfAny, UnionType, get_proper_type
from mypy.types import Type as MypyType

_MODULE = 'torch.nn.modules.module.Module.'


def _as_any(context: AttributeContext) -> MypyType:
    declared: ProperType = get_proper_type(context.default_attr_type)
    return AnyType(TypeOfAny.special_form) if isinstance(declared, UnionType) else declared


class ModulesPlugin(Plugin):
    """Answers for nn.Module.__getattr__."""

    def get_attribute_hook(self, fullname: str) -> Optional[Callable[[AttributeContext], MypyType]]:
        return _as_any if fullname.startswith(_MODULE) else None


def plugin(version: str) -> Type[Plugin]:
    return ModulesPlugin
