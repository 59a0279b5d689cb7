"""Stored audit results of timm's own classes, per timm version. Their conversion then needs no audit run."""
import json
from functools import lru_cache
from pathlib import Path
from typing import Dict, List

import timm
import torch.nn as nn

from .verdicts import Finding, class_name

__all__ = ['is_known', 'known_records', 'TABLES']

TABLES = Path(__file__).parent / 'tables'  # one file per timm version, written by benchmarks/audit_table.py


@lru_cache(maxsize=None)
def _table(version: str) -> Dict[str, Dict[str, str]]:
    """Return class name -> {analog operation: reason}; empty for a timm version that was not audited."""
    file = TABLES / f'timm_{version}.json'
    if not file.is_file():
        return {}
    modules = json.loads(file.read_text())
    return {f'{module}.{cls}': ops for module, classes in modules.items() for cls, ops in classes.items()}


def is_known(model: nn.Module) -> bool:
    """Return whether a model consists of unmodified classes that were audited with this timm version.

    Args:
        model: The ANN, before its conversion.
    """
    table = _table(timm.__version__)
    return type(model).__module__.startswith(('timm.', 'timm_sscl.')) and all(
        class_name(module) in table and _has_own_forward(module) for module in model.modules())


def _has_own_forward(module: nn.Module) -> bool:
    """Return whether a module runs its class's forward, or another method of its class that its __init__ selected."""
    forward = vars(module).get('forward')
    if forward is None:
        return True
    name = getattr(forward, '__name__', '')
    return getattr(forward, '__self__', None) is module and forward.__func__ is getattr(type(module), name, None)


def known_records(model: nn.Module) -> List[Finding]:
    """Return the stored findings for the modules of a spiking model, one per module and operation."""
    table = _table(timm.__version__)
    return [Finding(f'{name}.{op}' if name else op, op, reason, False)
            for name, module in model.named_modules()
            for op, reason in table.get(class_name(module), {}).items()]
