"""Check that student and teacher share nothing, since freezing the teacher would freeze it in the student."""
from typing import Dict, Iterator, List, Tuple

import torch
import torch.nn as nn
from timm.utils import unwrap_model
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ['check_nothing_shared']

_Span = Tuple[str, int, int, str]  # device, first and last byte there, name of the tensor


def check_nothing_shared(student: nn.Module, teacher: nn.Module) -> None:
    """Check that student and teacher share no module and no memory of a parameter or buffer.

    Raises:
        ValueError: They are the same model or share something. The message names it.
    """
    student, teacher = unwrap_model(student), unwrap_model(teacher)
    if student is teacher:
        raise ValueError('student and teacher are the same module; the teacher must be a model of its own.')
    shared = _shared_modules(student, teacher) or _shared_tensors(student, teacher)
    if shared:
        more = f' and {len(shared) - 3} more' if len(shared) > 3 else ''
        raise ValueError(
            f'student and teacher share {", ".join(shared[:3])}{more}: the loss freezes the teacher and runs it in '
            f'evaluation mode, which would reach the student. Give the teacher its own (copy.deepcopy).')


def _shared_modules(student: nn.Module, teacher: nn.Module) -> List[str]:
    """Return the outermost modules that are in both models."""
    names = {id(module): name for name, module in student.named_modules(remove_duplicate=False)}
    shared: List[str] = []
    inside: Tuple[str, ...] = ()  # prefixes of modules that are already listed
    for name, module in teacher.named_modules():
        if id(module) in names and not name.startswith(inside):
            whose = f"the module '{names[id(module)] or type(student).__name__}'"
            shared.append(whose if name == names[id(module)] else f"{whose} (the teacher's '{name}')")
            inside += (f'{name}.',) if name else ('',)
    return shared


def _shared_tensors(student: nn.Module, teacher: nn.Module) -> List[str]:
    """Return the student's parameters and buffers whose memory overlaps with the teacher's."""
    spans = sorted([(*span, False) for span in _spans(student)] + [(*span, True) for span in _spans(teacher)])
    shared: List[str] = []
    # per device and model, the last byte so far and the tensor it belongs to
    reach: Dict[Tuple[str, bool], Tuple[int, str]] = {}
    for where, first, last, name, of_teacher in spans:
        end, other = reach.get((where, not of_teacher), (-1, ''))
        if first <= end:
            ours, theirs = (other, name) if of_teacher else (name, other)
            shared.append(f"'{ours}'" if ours == theirs else f"'{ours}' (the teacher's '{theirs}')")
        reach[where, of_teacher] = max(reach.get((where, of_teacher), (-1, '')), (last, name))
    return shared


def _spans(model: nn.Module) -> Iterator[_Span]:
    """Yield (device, first byte, last byte, name) of every parameter and buffer."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not _has_memory(tensor):
            yield 'object', id(tensor), id(tensor), name
        elif tensor.numel():
            reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
            first, size = tensor.data_ptr(), tensor.element_size()
            yield str(tensor.device), first, first + reach * size + size - 1, name


def _has_memory(tensor: torch.Tensor) -> bool:
    """Return whether a tensor's elements have an address: not on the meta device, sparse, lazy or a wrapper subclass.
    """
    return not (is_lazy(tensor) or tensor.is_meta or tensor.layout != torch.strided
                or is_traceable_wrapper_subclass(tensor))
