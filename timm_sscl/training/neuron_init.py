"""--neuron-init: set gains or thresholds of the student's neurons from real images."""
import logging
from argparse import Namespace
from typing import Any, Optional

import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.utils import broadcast

from timm_sscl.conversion import SpikingReport, calibrate, convert_ann
from timm_sscl.conversion.scales.gains import RMS
from timm_sscl.conversion.model import SpikingModule
from timm_sscl.conversion.from_ann.thresholds import PERCENTILE

from .steps.compiling import CompileClock

__all__ = ['prepare_neurons']

_logger = logging.getLogger('train')

_THRESHOLD_IMAGES = 512  # number of images on which --neuron-init ann measures activations


def prepare_neurons(
        args: Namespace,
        accelerator: Accelerator,
        student: nn.Module,
        loader: Any,
        resumed: bool,
) -> Optional[SpikingReport]:
    """--neuron-init: set gains or thresholds of a spiking student from real images; return its conversion report.

    Returns None for an ANN. Gains of a resumed or loaded student are kept.
    """
    if not isinstance(student, SpikingModule):
        return None
    images = _first_images(loader, _THRESHOLD_IMAGES if args.neuron_init == 'ann' else args.batch_size)
    images = broadcast(images.to(next(student.parameters())))  # all processes use the same images
    has_gains = any(lif.gain is not None for lif in student.neurons().values())
    with CompileClock('neurons to measure their gains'):
        if resumed or has_gains:
            _logger.info('Neurons keep the gains of the checkpoint.')
        elif args.neuron_init == 'calibrated':
            calibrate(student, images, args.threshold_rule or RMS, args.threshold_factor)
        elif args.neuron_init == 'ann':
            convert_ann(student, images, student.timesteps, percentile=args.ann_percentile,
                        rule=args.threshold_rule or PERCENTILE, factor=args.threshold_factor)
    report = student.spiking_report()
    if accelerator.is_main_process:
        report.macs(images[:4])
        _logger.info(str(report))
    return report


def _first_images(loader: Any, n: int) -> torch.Tensor:
    """Return n training images, or all if there are fewer. The random state is set again before the training."""
    batches, count = [], 0
    for input, *_ in loader:
        batches.append(input)
        count += len(input)
        if count >= n:
            break
    return torch.cat(batches)[:n]
