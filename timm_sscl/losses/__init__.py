"""Losses by name, one per file, with critics and CKA. They depend on tensors, not on models."""
from .cka import cka, hsic
from .critics import info_nce_loss, mi_lower_bound, nce_loss
from .firing_rate import FiringRateLoss, firing_rate_loss
from .inputs import TrainStep
from .kd import KDLoss, StepKDLoss, kd_loss, kd_step_loss
from .options import LossOption
from .registry import (
    LossSpec, create_loss, list_losses, loss_compares_classes, loss_is_global, loss_needs, loss_spec, register_loss,
    unregister_loss)
from .pair_critics import Critic, InfoNCECritic, NCECritic, QueuedCritic
from .projections import FlattenedProjection, PooledProjection, Projection
from .sscl import SSCLCriterion
from .tet import TETLoss, tet_loss
from .weightings import (
    CKAWeighting, FixedWeighting, InverseCKAWeighting, ShuffledWeighting, UncertaintyWeighting, UniformWeighting,
    Weighting)

__all__ = [
    'CKAWeighting', 'Critic', 'FiringRateLoss', 'FixedWeighting', 'FlattenedProjection', 'InfoNCECritic',
    'InverseCKAWeighting', 'KDLoss', 'LossOption', 'LossSpec', 'NCECritic', 'PooledProjection', 'Projection',
    'QueuedCritic', 'SSCLCriterion', 'ShuffledWeighting', 'StepKDLoss', 'TETLoss', 'TrainStep',
    'UncertaintyWeighting', 'UniformWeighting', 'Weighting', 'cka', 'create_loss', 'firing_rate_loss', 'hsic',
    'info_nce_loss', 'kd_loss', 'kd_step_loss', 'list_losses', 'loss_compares_classes', 'loss_is_global',
    'loss_needs', 'loss_spec', 'mi_lower_bound', 'nce_loss', 'register_loss', 'tet_loss', 'unregister_loss',
]
