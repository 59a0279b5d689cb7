"""Losses by name, one per file, with critics and CKA. They depend on tensors, not on models."""
from .at import attention_transfer
from .bkdsnn import BKDSNNLoss, weighted_soft_loss
from .cka import cka, hsic
from .cka_loss import cka_loss, cka_of_taps
from .crd import CRDLoss, crd_side
from .critics import info_nce_loss, mi_lower_bound, nce_loss
from .dist import DISTLoss, dist_loss
from .dkd import DKDLoss, dkd_loss
from .enof import EnOFLoss
from .feature_mse import KDSNNFeatureLoss
from .firing_rate import FiringRateLoss, firing_rate_loss
from .hta_kl import HTAKLLoss, hta_kl_loss
from .im import IMLoss, im_loss
from .inputs import TrainStep
from .kd import KDLoss, StepKDLoss, kd_loss, kd_step_loss
from .meom import MEOMLoss, next_step_loss
from .options import LossOption
from .pair_critics import Critic, InfoNCECritic, NCECritic, QueuedCritic
from .projections import FlattenedProjection, PooledProjection, Projection
from .registry import (
    LossSpec, create_loss, list_losses, loss_compares_classes, loss_is_global, loss_needs, loss_spec, register_loss,
    unregister_loss)
from .rmp import RMPLoss, rmp_loss
from .seal_kd import SeAlKDLoss, error_aware_loss, step_agreement_loss
from .sp import similarity_loss, similarity_preserving
from .sscl import SSCLCriterion
from .standardized import StandardizedKDLoss
from .tet import TETLoss, tet_loss
from .tser import TSERLoss
from .twsnn import TWSNNLoss, self_distillation_loss
from .weightings import (
    CKAWeighting, FixedWeighting, InverseCKAWeighting, ShuffledWeighting, UncertaintyWeighting, UniformWeighting,
    Weighting)

__all__ = [
    'BKDSNNLoss', 'CKAWeighting', 'CRDLoss', 'Critic', 'DISTLoss', 'DKDLoss', 'EnOFLoss', 'FiringRateLoss',
    'FixedWeighting', 'FlattenedProjection', 'HTAKLLoss', 'IMLoss', 'InfoNCECritic', 'InverseCKAWeighting', 'KDLoss',
    'KDSNNFeatureLoss', 'LossOption', 'LossSpec', 'MEOMLoss', 'NCECritic', 'PooledProjection', 'Projection',
    'QueuedCritic', 'RMPLoss', 'SSCLCriterion', 'SeAlKDLoss', 'ShuffledWeighting', 'StandardizedKDLoss', 'StepKDLoss',
    'TETLoss', 'TSERLoss', 'TWSNNLoss', 'TrainStep', 'UncertaintyWeighting', 'UniformWeighting', 'Weighting',
    'attention_transfer', 'cka', 'cka_loss', 'cka_of_taps', 'crd_side', 'create_loss', 'dist_loss', 'dkd_loss',
    'error_aware_loss', 'firing_rate_loss', 'hsic', 'hta_kl_loss', 'im_loss', 'info_nce_loss', 'kd_loss',
    'kd_step_loss', 'list_losses', 'loss_compares_classes', 'loss_is_global', 'loss_needs', 'loss_spec',
    'mi_lower_bound', 'nce_loss', 'next_step_loss', 'register_loss', 'rmp_loss', 'self_distillation_loss',
    'similarity_loss', 'similarity_preserving', 'step_agreement_loss', 'tet_loss', 'unregister_loss',
    'weighted_soft_loss',
]
