"""What a conversion did to a model, and how spiking the result is."""
from collections import Counter
from typing import Any, Dict, List, Optional, Sequence

import torch
import torch.nn as nn

from .batch_axis import PENDING
from timm_sscl.neurons import SpikingNeuron
from timm_sscl.probing import probe_sizes

from timm_sscl.report.macs import KINDS, MacShares, count_macs

__all__ = ['SpikingReport']


class SpikingReport(list):
    """The conversion's records, one per activation; printed, a summary of them and of the MACs.

    Args:
        records: ConversionRecords: name, was, now, reason.
        model: The spiking model.
        obstacles: Why its ReLUs cannot be replaced by thresholds (convert_ann); empty where they can.
    """

    def __init__(self, records: Sequence[Any], model: nn.Module, obstacles: Sequence[str]):
        super().__init__(records)
        self.model = model
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self.obstacles = list(obstacles)
        self._macs: Optional[MacShares] = None

    @property
    def neurons(self) -> List[Any]:
        """Records of the activations that are neurons."""
        return [record for record in self if self._is_neuron(record)]

    @property
    def analog(self) -> List[Any]:
        """Records of those that stay real-valued."""
        return [record for record in self if not self._is_neuron(record)]

    def _is_neuron(self, record: Any) -> bool:
        return isinstance(self._modules.get(record.name), SpikingNeuron)

    @property
    def norms(self) -> List[Any]:
        """What became of every norm (name, was, now, alpha), where the conversion was to change them (norm='tdbn')."""
        return self.variants.get('norm', [])

    @property
    def variants(self) -> Dict[str, List[Any]]:
        """What the model's variants did, by kind: records that begin with name, was, now."""
        return {kind: list(variant.records(self.model)) for kind, variant in self.model.settings.variants().items()}

    def macs(self, images: Optional[torch.Tensor] = None) -> Optional[MacShares]:
        """MACs per image over all time steps, by what their input is.

        Args:
            images: Real images for the firing to be real; one image of noise by default.

        Returns:
            MacShares; None on the meta device, or where the model does not run on a guessed image.
        """
        if images is not None:
            self._macs = count_macs(self.model, images)
        elif self._macs is None:
            self._macs = self._guessed()
        return self._macs

    def _guessed(self) -> Optional[MacShares]:
        like = next((p for p in self.model.parameters() if p.is_floating_point()), torch.zeros(()))
        if like.is_meta:
            return None
        generator = torch.Generator().manual_seed(0)
        for size in probe_sizes(self.model):
            try:
                return count_macs(self.model, torch.randn(1, *size, generator=generator).to(like))
            except Exception:  # whatever an unknown model raises on an input that is not its own
                continue
        return None

    def as_dict(self) -> Dict[str, Any]:
        """For JSON: the records, the stem's pooling and the norms where they were changed, the MAC shares if they were
        counted, and the obstacles to convert_ann."""
        macs = None if self._macs is None else {kind: getattr(self._macs, kind) for kind in KINDS}
        return dict(
            activations=[record._asdict() for record in self], stem_pool=self.model.settings.stem_pool,
            norms=[record._asdict() for record in self.norms], macs=macs,
            audit=None if self.model._audit is None else self.model._audit.status, convert_ann=self.obstacles)

    def __str__(self) -> str:
        lines = [f'{type(self.model).__name__}, T={self.model.timesteps}: {len(self.neurons)} neuron layers '
                 f'({_counted(self.neurons)}), {len(self.analog)} activations stay analog']
        reasons: Dict[str, List[Any]] = {}
        for record in self.analog:
            reasons.setdefault(record.reason, []).append(record)
        lines += [f'  {_counted(records)}: {reason} ({records[0].name}{", ..." if records[1:] else ""})'
                  for reason, records in reasons.items()]
        pending = sum(PENDING in record.reason for record in self)
        if pending:
            lines.append(f'  {pending} converted on the meta device, where it is not seen whether axis 0 is the batch '
                         f'(pending)')
        if self.model._audit is not None:
            lines.append(f'  audit: {self.model._audit.status}')
        for kind, variant in self.model.settings.variants().items():
            summary = variant.summary(self.model)
            lines += [f'  {kind}: {summary}'] if summary else []
        macs = self.macs()
        if macs is not None:
            shares = ', '.join(f'{100 * macs.share(kind):.1f} % {kind}' for kind in KINDS)
            lines.append(f'  MACs per image {macs.total:.3g}, by their input: {shares}')
        lines.append('  convert_ann (thresholds from a trained ANN): '
                     + ('does not apply, ' + '; '.join(self.obstacles) if self.obstacles else 'applies'))
        return '\n'.join(lines)

    __repr__ = list.__repr__


def _counted(records: Sequence[Any]) -> str:
    return ', '.join(f'{n} {kind}' for kind, n in Counter(record.was for record in records).most_common())

