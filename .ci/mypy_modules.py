"""mypy plugin: an attribute of a module that its class does not declare is Any, where torch says Tensor | Module.

This holds where it is read and where it is assigned.
"""
from typing import Callable, Optional, Type

from mypy.nodes import FuncDef
from mypy.plugin import AttributeContext, ClassDefContext, Plugin
from mypy.types import AnyType, CallableType, ProperType, TypeOfAny, UnionType, get_proper_type
from mypy.types import Type as MypyType

_MODULE = 'torch.nn.modules.module.Module'


def _as_any(context: AttributeContext) -> MypyType:
    declared: ProperType = get_proper_type(context.default_attr_type)
    return AnyType(TypeOfAny.special_form) if isinstance(declared, UnionType) else declared


def _takes_any(context: ClassDefContext) -> None:
    for method in context.cls.defs.body:
        if isinstance(method, FuncDef) and method.name == '__setattr__' and isinstance(method.type, CallableType):
            method.type.arg_types[-1] = AnyType(TypeOfAny.special_form)


class ModulesPlugin(Plugin):
    """Answers for nn.Module.__getattr__ and nn.Module.__setattr__."""

    def get_attribute_hook(self, fullname: str) -> Optional[Callable[[AttributeContext], MypyType]]:
        return _as_any if fullname.startswith(f'{_MODULE}.') else None

    def get_customize_class_mro_hook(self, fullname: str) -> Optional[Callable[[ClassDefContext], None]]:
        return _takes_any if fullname == _MODULE else None


def plugin(version: str) -> Type[Plugin]:
    return ModulesPlugin
