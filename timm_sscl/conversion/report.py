"""SpikingReport: what a conversion did to a model, and which share of its MACs has spikes as input."""
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn

from timm_sscl.neurons import SpikingNeuron
from timm_sscl.probing import probe_sizes
from timm_sscl.report.macs import KINDS, MacShares, count_macs

from .from_ann.ann_obstacles import ann_obstacles
from .over_time.batch_axis import PENDING

__all__ = ['SpikingReport', 'make_report']


@dataclass(eq=False, repr=False)
class SpikingReport(Sequence):
    """What a conversion did: a sequence of records, one per activation. Printing it computes nothing.

    Attributes:
        model: The spiking model.
        records: ConversionRecords (name, was, now, reason), one per activation.
        neurons: Records of activations that are neurons.
        analog: Records of activations that stay analog.
        timesteps: T when the report was made.
        variants: kind -> records of each variant, which start with name, was, now.
        summaries: kind -> what each variant did, in words.
        stem: Name of the neuron before which everything runs once per image (`share_stem`), or None.
        drives: LayerDrives of the last `calibrate`; empty without.
        folds: Result of the last `fold_gains`, one Folded per factor; empty without.
        obstacles: What prevents `convert_ann`; empty if it applies.
        audit: Status of the conversion's audit; None if the model's classes are known.
        mac_shares: MACs by the kind of their input; None until `macs` has counted them.
        mac_size: Shape of one image for which the MACs were counted.
        output: What the neurons pass on, in words.
    """
    model: nn.Module
    records: List[Any]
    neurons: List[Any]
    analog: List[Any]
    timesteps: int
    variants: Dict[str, List[Any]]
    summaries: Dict[str, str]
    stem: Optional[str]
    drives: List[Any]
    folds: List[Any]
    obstacles: List[str]
    audit: Optional[str]
    mac_shares: Optional[MacShares] = None
    mac_size: Optional[Tuple[int, ...]] = None
    output: str = 'binary'

    def __getitem__(self, index: Any) -> Any:
        return self.records[index]

    def __len__(self) -> int:
        return len(self.records)

    def __repr__(self) -> str:
        return repr(self.records)

    @property
    def norms(self) -> List[Any]:
        """Records of all norms (name, was, now, alpha) if the conversion changes norms (norm='tdbn'), else an empty
        list.
        """
        return self.variants.get('norm', [])

    def macs(self, images: Optional[torch.Tensor] = None) -> Optional[MacShares]:
        """Count the MACs per image over all timesteps, by the kind of their input. Without images they are counted
        once.

        Args:
            images: Real images, for realistic firing rates. By default one image of noise, of a guessed size.

        Returns:
            MacShares; None on the meta device, or if the model runs on no guessed image.
        """
        if images is not None:
            self.mac_shares, self.mac_size = count_macs(self.model, images), tuple(images.shape[1:])
        elif self.mac_shares is None:
            self.mac_shares = self._guessed()
        return self.mac_shares

    def _guessed(self) -> Optional[MacShares]:
        """Count the MACs on one image of noise of a guessed size; None if the model runs on none."""
        like = next((p for p in self.model.parameters() if p.is_floating_point()), torch.zeros(()))
        if like.is_meta:
            return None
        generator = torch.Generator().manual_seed(0)
        for size in probe_sizes(self.model):
            try:
                shares = count_macs(self.model, torch.randn(1, *size, generator=generator).to(like))
            except Exception:  # an unknown model may raise anything on an unsuitable input
                continue
            self.mac_size = tuple(size)
            return shares
        return None

    def as_dict(self) -> Dict[str, Any]:
        """Return the report for JSON: records, stem pooling, variants, MAC shares if counted, obstacles to convert_ann.
        """
        macs = None if self.mac_shares is None else {kind: getattr(self.mac_shares, kind) for kind in KINDS}
        return dict(
            activations=[record._asdict() for record in self], stem_pool=self.model.settings.stem_pool,
            norms=[record._asdict() for record in self.norms],
            residuals=[record._asdict() for record in self.variants.get('residual', [])], macs=macs,
            audit=self.audit, convert_ann=self.obstacles)

    def __str__(self) -> str:
        lines = [f'{type(self.model).__name__}, T={self.timesteps}: {len(self.neurons)} neuron layers '
                 f'({_counted(self.neurons)}), {len(self.analog)} activations stay analog']
        lines += [f'  output of the neurons: {self.output}'] if self.output != 'binary' else []
        reasons: Dict[str, List[Any]] = {}
        for record in self.analog:
            reasons.setdefault(record.reason, []).append(record)
        lines += [f'  {_counted(records)}: {reason} ({records[0].name}{", ..." if records[1:] else ""})'
                  for reason, records in reasons.items()]
        pending = sum(PENDING in record.reason for record in self)
        if pending:
            lines.append(f'  {pending} converted on the meta device, where it is not seen whether axis 0 is the batch '
                         f'(pending)')
        lines += [f'  audit: {self.audit}'] if self.audit is not None else []
        if self.model.settings.pool_first:
            lines.append(f'  fire after their max pooling: {", ".join(self.model.settings.pool_first)}')
        lines += [f'  {kind}: {summary}' for kind, summary in self.summaries.items() if summary]
        if self.mac_shares is not None:
            shares = ', '.join(f'{100 * self.mac_shares.share(kind):.1f} % {kind}' for kind in KINDS)
            lines.append(f'  MACs per image of shape {self.mac_size}: {self.mac_shares.total:.3g}, by their input: '
                         f'{shares}')
        lines.append('  convert_ann (thresholds from a trained ANN): '
                     + ('does not apply, ' + '; '.join(self.obstacles) if self.obstacles else 'applies'))
        return '\n'.join(lines)


def make_report(model: nn.Module, records: Sequence[Any]) -> SpikingReport:
    """Create the report on the current state of a spiking model.

    Args:
        model: Spiking model.
        records: Its ConversionRecords.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    spiking = {record.name for record in records if isinstance(modules.get(record.name), SpikingNeuron)}
    variants = model.settings.variants()
    return SpikingReport(
        model, list(records), [record for record in records if record.name in spiking],
        [record for record in records if record.name not in spiking], model.timesteps,
        variants={kind: list(variant.records(model)) for kind, variant in variants.items()},
        summaries={kind: variant.summary(model) for kind, variant in variants.items()}, stem=model.settings.stem,
        drives=list(model._drives), folds=list(model._folds), obstacles=ann_obstacles(model),
        audit=None if model._audit is None else model._audit.status,
        output=', '.join(sorted({neuron.output_text() for neuron in model.neurons().values()})))


def _counted(records: Sequence[Any]) -> str:
    """Count records by the class of the activation, as text."""
    return ', '.join(f'{n} {kind}' for kind, n in Counter(record.was for record in records).most_common())

