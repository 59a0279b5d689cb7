"""List what prevents the conversion of an ANN by thresholds (convert_ann)."""
from typing import Dict, List

import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..settings import WITH_OPTIONS

__all__ = ['RECTIFIERS', 'ann_obstacles', 'obstacles_by_class']

RECTIFIERS = {'ReLU', 'ReLU6', 'relu', 'relu_', 'relu6', 'QCFS'}


def ann_obstacles(model: nn.Module) -> List[str]:
    """List the parts of a spiking model that prevent convert_ann: other activations than ReLU, tdBN, other norms,
    attention.

    Args:
        model: Spiking model. Its weights do not matter.

    Returns:
        One line per kind of part; empty if convert_ann applies.
    """
    found: Dict[str, List[str]] = {}
    for record in model._records():
        if record.was not in RECTIFIERS:
            found.setdefault(record.was, []).append(record.name)
    for kind in WITH_OPTIONS:
        variant = model.settings.variants().get(kind)
        for record in variant.records(model) if variant is not None else ():
            if record.now != record.was:
                found.setdefault(record.now, []).append(record.name)
    return obstacles_by_class(model, found)


def obstacles_by_class(model: nn.Module, found: Dict[str, List[str]]) -> List[str]:
    """List norms and attention that prevent convert_ann, after what was found already.

    Args:
        model: Any model.
        found: Class -> names of obstacles so far; completed in place.

    Returns:
        One line per class.
    """
    for name, module in model.named_modules():
        kind = type(module).__name__
        attends = 'attention' in kind.lower() and any(True for _ in module.children())
        if ('norm' in kind.lower() and not isinstance(module, _BatchNorm)
                and module._parameters.get('weight') is not None) or attends:
            found.setdefault(kind, []).append(name)
    return [f'{len(names)} {kind} ({names[0]}{", ..." if len(names) > 1 else ""})' for kind, names in found.items()]
