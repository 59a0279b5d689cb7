"""QCFS: the activation to train an ANN with if it will be converted to few timesteps."""
import math
from typing import Any, Dict, List

import torch
import torch.nn as nn

from timm_sscl.untouched import undone_on_error

from .ann_obstacles import RECTIFIERS, obstacles_by_class
from ..finding.plan import Plan
from ..finding.policy import Policy

__all__ = ['QCFS', 'QCFS_THRESHOLD', 'check_learned', 'convert_to_qcfs']

QCFS_THRESHOLD = 8.  # before the training


class _Floor(torch.autograd.Function):
    """Round down. The gradient passes unchanged (straight-through)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.floor()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


class QCFS(nn.Module):
    """Quantisation-clip-floor-shift activation (Bu et al. 2022, "Optimal ANN-SNN conversion").

        y = threshold * clip(floor(x * levels / threshold + 1/2) / levels, 0, 1)

    This is the mean output of an integrate-and-fire neuron (soft reset, initial potential half the threshold) over
    `levels` timesteps of a constant input x. `convert_ann` makes this neuron of it, with the learned threshold. The
    gradient passes the floor unchanged and is 0 below 0 and above the threshold, as in the authors' code. The threshold
    is a parameter of shape (); it is trained and must stay above 0.

    Args:
        levels: Number of levels L above 0.
        threshold: Initial threshold (lambda in the paper).

    Raises:
        ValueError: levels is not a positive whole number, or threshold is not positive and finite.
    """

    def __init__(self, levels: int = 8, threshold: float = QCFS_THRESHOLD):
        super().__init__()
        if isinstance(levels, bool) or not isinstance(levels, int) or levels < 1:
            raise ValueError(f'levels={levels!r}: must be a whole number of levels, 1 or more.')
        if not 0 < threshold < math.inf:
            raise ValueError(f'threshold={threshold}: must be a finite number above 0.')
        self.levels = levels
        self.threshold = nn.Parameter(torch.tensor(float(threshold)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share = (x / self.threshold).clamp(0, 1)
        return self.threshold * (_Floor.apply(share * self.levels + .5) / self.levels)

    def extra_repr(self) -> str:
        return f'levels={self.levels}'


def check_learned(model: nn.Module) -> None:
    """Raise ValueError for a QCFS of a model, or one that a neuron replaced, whose threshold no neuron can have."""
    for name, module in model.named_modules():
        module = vars(module).get('replaced', module)
        if isinstance(module, QCFS) and not 0 < module.threshold.item() < math.inf:
            raise ValueError(f'{type(model).__name__}: the QCFS {name} has learned the threshold '
                             f'{module.threshold.item():.3g}, which no neuron can have; it must be finite and above 0.')


def convert_to_qcfs(model: nn.Module, levels: int = 8, threshold: float = QCFS_THRESHOLD) -> nn.Module:
    """Replace the ReLUs of an ANN by QCFS activations, in place. Train it, then call `convert_ann`.

    Every ReLU or ReLU6 module becomes a QCFS with a threshold of its own, a new parameter `<name>.threshold` in the
    state dict. Hooks and module names stay. The network's output changes: train it, or continue its training.

    Args:
        model: ANN of timm or any other.
        levels: Number of levels L. The converted network is most accurate from about T = L timesteps.
        threshold: Initial threshold of every layer.

    Returns:
        The model itself.

    Raises:
        ValueError: levels or threshold is out of range; the model has no ReLU, has one that is a function call
            (F.relu), or has parts that `convert_ann` refuses (other activations, layer norms, attention). The model is
            left unchanged.
    """
    QCFS(levels, threshold)  # checks the arguments
    plan = Plan(model, Policy(model, None, None), 'QCFS')
    _check(model, plan)
    with undone_on_error(model):
        _replace(model, plan, levels, threshold)
    return model


def _check(model: nn.Module, plan: Plan) -> None:
    """Raise ValueError, naming the part, if convert_ann would refuse the trained model or a ReLU is no module."""
    kind = type(model).__name__
    if any(isinstance(module, QCFS) for module in model.modules()):
        raise ValueError(f'{kind} has QCFS activations already; a second call would reset their thresholds.')
    found: Dict[str, List[str]] = {}
    for record in plan.records:
        if record.was not in RECTIFIERS:
            found.setdefault(record.was, []).append(record.name)
    obstacles = obstacles_by_class(model, found)
    if obstacles:
        raise ValueError(f'{kind} is not a network of ReLU and batch norms, which convert_ann needs: '
                         f'{"; ".join(obstacles)}.')
    functions = [record for record in plan.records if record.name not in plan.swaps]
    if functions:
        raise ValueError(f'{kind}: {functions[0].name} ({functions[0].was}) is a function call and no module to '
                         f'replace; make it one (self.act = nn.ReLU()).')
    if not plan.swaps:
        raise ValueError(f'{kind} has no ReLU to replace; a spiking model is made of the trained ANN, afterwards.')


def _replace(model: nn.Module, plan: Plan, levels: int, threshold: float) -> None:
    """Replace the activations of a plan; one that has several names is replaced by one QCFS."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(()))
    new: Dict[int, QCFS] = {}
    for parent, child_name, child in plan.swaps.values():
        if id(child) not in new:
            new[id(child)] = QCFS(levels, threshold).to(like.device, like.dtype).train(child.training)
            for name, hooks in vars(child).items():
                if name.endswith(('_hooks', '_hooks_with_kwargs', '_hooks_always_called')) and 'state_dict' not in name:
                    vars(new[id(child)])[name] = hooks  # the dictionaries themselves: handles still remove their hooks
        parent._modules[child_name] = new[id(child)]
