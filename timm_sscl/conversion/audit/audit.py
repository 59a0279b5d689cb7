"""Audit a conversion: run the model and collect the operations that the records do not list."""
from dataclasses import dataclass, field
from typing import Any, FrozenSet, List, Sequence

import torch.nn as nn

from timm_sscl.neurons import SpikingNeuron
from timm_sscl.conversion.finding.policy import Policy
from timm_sscl.probing import ProbeError, probe

from .run import run
from .verdicts import Finding, findings, notes

__all__ = ['Audit', 'audit']

_SAMPLES = 2


@dataclass
class Audit:
    """Result of auditing a conversion.

    Args:
        status: One line for the report.
        findings: Nonlinear operations that stay analog and are not in the conversion's records.
        hard_sigmoids: Names of neurons inside a hand-written hard sigmoid, relu6(x + 3) / 6, which is a gate.
    """
    status: str
    findings: List[Finding] = field(default_factory=list)
    hard_sigmoids: FrozenSet[str] = frozenset()

    @property
    def unknown(self) -> List[Finding]:
        """Findings without an explanation."""
        return [finding for finding in self.findings if finding.unknown]


def audit(
        model: nn.Module,
        records: Sequence[Any],
        policy: Policy,
        input_size: Any = None,
        example_inputs: Any = None,
) -> Audit:
    """Run a spiking model once in evaluation and once in training mode and find nonlinear operations outside its
    neurons.

    Values do not matter: neurons pass their input on. The model is left unchanged.

    Args:
        model: The spiking model.
        records: ConversionRecords of its conversion.
        policy: include and exclude of the conversion.
        input_size: Shape of one sample; guessed by default.
        example_inputs: Input of the model; see `probing.examples`.

    Returns:
        An Audit. Its status starts with 'pending' if the model runs on no input or is on the meta device.
    """
    if any(p.is_meta for p in model.parameters()):
        return Audit('pending: the model is on the meta device, where nothing runs')
    try:
        seen = probe(model, lambda example: run(model, example), _SAMPLES, input_size, example_inputs)
    except ProbeError as error:
        return Audit(f'pending: {error}')
    neurons = [name for name, module in model.named_modules() if isinstance(module, SpikingNeuron)]
    return Audit('; '.join(['all operations of one forward', *notes(seen, neurons)]),
                 findings(model, seen, records, policy), frozenset(seen.hard_sigmoids))
