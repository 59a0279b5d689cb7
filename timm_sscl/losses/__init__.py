from .factory import (
    create_loss, list_losses, loss_compares_classes, loss_is_global, loss_needs, register_loss)
from .firing_rate import FiringRateLoss, firing_rate_loss
from .kd import KDLoss, kd_loss
from .kd_step import StepKDLoss, kd_step_loss
from .nce import info_nce_loss, mi_lower_bound, nce_loss
from .sscl import SSCLCriterion
from .step import TrainStep
from .tet import TETLoss, tet_loss
