"""Replace a model's activations by neurons and back, in place, and report what became of each."""
from typing import Dict, Iterator, List, Sequence

import torch
import torch.nn as nn

from timm_sscl.neurons import SpikingNeuron

from ..audit import known_records
from .call_sites import CallSites, set_calls
from .functional_calls import NEURON_NAME
from ..over_time.fused import return_to_fused_path
from .hidden_activations import take_neuron
from .plan import ConversionRecord, Plan
from .policy import Policy
from ..from_ann.pool_first import set_pool_first
from ..settings import SpikingSettings

__all__ = ['swap_modules', 'current_records', 'audit_records', 'unswap_modules']


def swap_modules(model: nn.Module, settings: SpikingSettings) -> List[ConversionRecord]:
    """Replace the activations below model that are not replaced yet, in place; return a record for each activation."""
    plan = Plan(model, Policy(model, settings.include, settings.exclude), settings.neuron_class_name)
    plan.check(model)
    plan.apply(model, settings)
    return plan.records


def current_records(model: nn.Module, converted: Sequence[ConversionRecord]) -> List[ConversionRecord]:
    """Return records of the model's current activations, including modules exchanged, added or removed after the
    conversion.

    Args:
        model: Spiking model.
        converted: Records of the conversion.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    records, recorded = [], set()
    for record in _records_per_call(converted, modules):
        module = modules.get(record.name)
        if not record.becomes_neuron:
            # an activation that stays analog may be a function (F.gelu) instead of a module
            exists = record.name.rpartition('.')[0] in modules
            records += [record] if exists and not isinstance(module, SpikingNeuron) else []
        elif module is not None:
            now, reason = type(module).__name__, record.reason
            if not isinstance(module, SpikingNeuron):
                by = module.__dict__.get('added_by')
                reason = f'replaced by {now} ' + ('after the conversion' if by is None else f'by {by}')
            records.append(record._replace(now=now, reason=reason))
        recorded.add(record.name)
    for name, module in model.neurons().items():
        if name not in recorded:
            by = module.__dict__.get('added_by')
            reason = 'added after the conversion' if by is None else f'added by {by}'
            records.append(ConversionRecord(name, 'nothing', type(module).__name__, reason))
    settings = model.settings
    plan = Plan(model, Policy(model, settings.include, settings.exclude), settings.neuron_class_name)
    records += [record._replace(now=record.was, reason='added after the conversion, stays analog')
                for record in plan.records if record.becomes_neuron and record.name not in recorded]
    return records


def _records_per_call(
        converted: Sequence[ConversionRecord],
        modules: Dict[str, nn.Module],
) -> Iterator[ConversionRecord]:
    """Yield the records; a neuron with one copy per call gets one record per copy."""
    for record in converted:
        module = modules.get(record.name)
        if not isinstance(module, CallSites):
            yield record
            continue
        for i in range(len(module)):
            yield record._replace(
                name=f'{record.name}.{i}', reason=f'{record.reason}, call {i + 1} of {len(module)}')


def audit_records(model: nn.Module) -> List[ConversionRecord]:
    """Return records for nonlinear operations that stay analog besides activations: functional gates and unknown
    operations.
    """
    found = known_records(model) if model._audit is None else model._audit.findings
    modules = dict(model.named_modules(remove_duplicate=False))
    return [ConversionRecord(finding.name, finding.op, finding.op, finding.reason) for finding in found
            if finding.name.removesuffix(finding.op).removesuffix('.') in modules]


def unswap_modules(model: nn.Module) -> None:
    """Restore the activations that neurons replaced below model, in place."""
    set_pool_first(model, None)
    set_calls(model, None)
    like = next(model.parameters(), torch.zeros(()))
    for module in list(model.modules()):
        module._modules.pop(NEURON_NAME, None)
        for name, child in list(module._modules.items()):
            if isinstance(child, SpikingNeuron) and 'replaced' in child.__dict__:
                module._modules[name] = child.replaced.to(like.device).train(child.training)
        take_neuron(module)
        return_to_fused_path(module)
