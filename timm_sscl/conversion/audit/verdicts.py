"""Turn the events of an audit into findings and notes for the report."""
from typing import Any, Dict, List, NamedTuple, Sequence

import torch.nn as nn

from timm_sscl.conversion.finding.functional_calls import NEURON_NAME
from timm_sscl.conversion.finding.policy import Policy

from .run import Run
from .taint import Event

__all__ = ['Finding', 'class_name', 'findings', 'message', 'notes']

GATE = 'gate (function), stays analog'
# names of the operations of functions whose names differ
_OPS_OF_FUNCTIONS = {'relu6': {'hardtanh'}, 'selu': {'elu'}, 'rrelu': {'rrelu_with_noise'}, 'prelu': {'_prelu_kernel'},
                     'softsign': {'abs', 'div'}}
# operations in timm's classes that look like activations, and what they are
_EXPLAINED = {
    ('timm.models.gemma4_vit.Gemma4ClippableLinear', 'clamp'): 'range of a checkpoint (infinite without), stays analog',
    ('timm.models._efficientnet_blocks.CondConvResidual', 'sigmoid'): 'gate (weights of experts), stays analog',
    ('timm.models.volo.VOLO', 'max'): 'pooling of the logits of all tokens, stays analog',
    ('timm.models.csatv2.SpatialAttention', 'amax'): 'pooling of channels for a gate, stays analog',
    ('timm.models.hiera.HieraBlock', 'amax'): 'pooling of tokens, stays analog',
    ('timm.models.hiera.MaskUnitAttention', 'amax'): 'pooling of queries, stays analog',
}


class Finding(NamedTuple):
    """A nonlinear operation that stays analog."""
    name: str  # path of the module, a dot, and the operation
    op: str
    reason: str
    unknown: bool  # whether it has no explanation


def findings(model: nn.Module, seen: Run, records: Sequence[Any], policy: Policy) -> List[Finding]:
    """Return the audit's findings that the conversion's records do not list.

    Args:
        model: The spiking model.
        seen: The audit's run.
        records: ConversionRecords of the conversion.
        policy: include and exclude of the conversion.
    """
    modules = dict(model.named_modules())
    analog = {record.name: record.was for record in records if record.now == record.was}
    found: Dict[str, Finding] = {}
    for event in seen.events:
        if not event.fates or _is_listed(event, analog):
            continue
        finding = _finding(event, modules, policy)
        if finding.name not in found or finding.unknown:
            found[finding.name] = finding
    if not seen.depends:
        found['output'] = Finding('output', 'output', 'unknown: the output does not depend on the input, as far as '
                                                      'torch shows', True)
    return list(found.values())


def notes(seen: Run, neurons: Sequence[str]) -> List[str]:
    """Return further remarks on an audit for the report: what did not run, control flow, noise."""
    lines = []
    idle = [name for name in neurons if name not in seen.fired]
    if idle:
        lines.append(f'{len(idle)} neurons did not run in it ({", ".join(idle[:3])}{", ..." if idle[3:] else ""})')
    flows = sorted({event.path or 'the model' for event in seen.events if event.op == 'control flow'})
    if flows:
        lines.append(f'control flow depends on the data in {", ".join(flows[:3])}; other branches were not seen')
    noisy = sorted(path or 'the model' for path in seen.noise)
    if noisy:
        lines.append(f'random numbers differ between the time steps in {", ".join(noisy[:3])}'
                     f'{", ..." if noisy[3:] else ""}')
    if seen.untrained is not None:
        lines.append(f'training mode was not seen ({seen.untrained})')
    return lines


def _is_listed(event: Event, analog: Dict[str, str]) -> bool:
    """Return whether the conversion's records already say that this operation stays analog."""
    if any(event.path == name or event.path.startswith(f'{name}.') for name in analog):
        return True
    prefix = f'{event.path}.' if event.path else ''
    own = [(name[len(prefix):], was) for name, was in analog.items() if name.startswith(prefix)]
    # functions called in this module; with several calls, names contain the call's number
    functions = [was for name, was in own if '.' not in name or name.rpartition('.')[0] == NEURON_NAME]
    ops = {name.strip().rstrip('_') for was in functions for name in was.split(',')}
    return event.op in ops or any(event.op in _OPS_OF_FUNCTIONS.get(name, ()) for name in ops)


def _finding(event: Event, modules: Dict[str, nn.Module], policy: Policy) -> Finding:
    name = f'{event.path}.{event.op}' if event.path else event.op
    if event.fates == {'gate'}:
        return Finding(name, event.op, GATE, False)
    around = [(path, type(modules[path]).__name__) for path in _upwards(event.path)]
    why = (_EXPLAINED.get((class_name(modules[event.path]), event.op))
           or policy.why_analog(name, event.op, around, gate=False))
    if why is not None:
        return Finding(name, event.op, why, False)
    where = event.path or class_name(modules['']).rpartition('.')[2]
    made = f' (in a {event.made} that is no registered submodule)' if event.made else ''
    output = ' (at the output)' if event.fates <= {'output', 'gate'} else ''
    return Finding(name, event.op, f'unknown: {event.op} in {where}{made}{output}', True)


def class_name(module: nn.Module) -> str:
    """Return the qualified name of a module's class; for a converted module, of its class before."""
    cls: Any = type(module)
    if 'mixed' in vars(cls):
        cls = cls.mixed[1]
    return f'{cls.__module__}.{cls.__name__}'


def _upwards(path: str) -> List[str]:
    """Return a path, all its parent paths, and the root ''."""
    parts = path.split('.') if path else []
    return ['.'.join(parts[:n]) for n in range(len(parts), -1, -1)]


def message(model_name: str, unknown: Sequence[Finding]) -> str:
    """Return the error message that lists unexplained findings."""
    lines = ''.join(f'\n  {finding.reason}' for finding in unknown[:20])
    more = f'\n  and {len(unknown) - 20} more' if unknown[20:] else ''
    return (f'{model_name}: {len(unknown)} nonlinear operations are no known activations and would stay analog in '
            f'silence:{lines}{more}\nMake them modules that are activations (nn.ReLU), or name the class of such a '
            f'module by register_activation(cls); name what is to stay analog by exclude=, or allow all of it by '
            f'allow_analog=True. The model is as it was.')
