"""Variant: an option of a conversion that changes more than the activation. One file per variant, one protocol."""
from dataclasses import dataclass, fields, replace
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Set

import torch
import torch.nn as nn

from timm_sscl.knobs import build, knob
from timm_sscl.neurons.base import check_timesteps, hashable

__all__ = ['Variant', 'VariantSettings', 'PerStepSettings', 'VariantRecord']


@dataclass(frozen=True)
class VariantSettings:
    """Base of a variant's settings: plain values, declared by `knob(default, help)`.

    A subclass may check its values in `check`.

    Raises:
        ValueError: A value is out of its range.
    """

    def __post_init__(self):
        for field in fields(self):
            object.__setattr__(self, field.name, hashable(getattr(self, field.name)))
        self.check()

    def check(self) -> None:
        """Raise ValueError, naming the setting, where a value is out of its range."""

    def at(self, timesteps: int) -> 'VariantSettings':
        """The settings of a model that is converted with T timesteps."""
        return self


@dataclass(frozen=True)
class PerStepSettings(VariantSettings):
    """Base of the settings of a variant with parameters per timestep.

    The parameters have `steps` entries, whatever `set_timesteps` says later: fewer timesteps use the first ones, more
    timesteps repeat the last.
    """
    steps: Optional[int] = knob(None, 'timesteps that have parameters (those of the conversion)', kw_only=True)

    def check(self) -> None:
        if self.steps is not None:
            check_timesteps(self.steps)

    def at(self, timesteps: int) -> 'PerStepSettings':
        return replace(self, steps=timesteps) if self.steps is None else self


class VariantRecord(NamedTuple):
    """One module that a variant met."""
    name: str
    was: str  # class before
    now: str  # class after, or what the variant calls it


class Variant:
    """Base of all variants. A variant has a `Settings` dataclass and changes a model in place.

    The settings of a model hold the variant's name and options, so that checkpoints restore it. `apply` runs at the
    conversion, after every change of the settings, and after timm's `reset_classifier`: on a model that has the variant
    already it takes over what changed, keeps parameters, and does the same to new modules. `remove` undoes it.

    A variant with parameters or buffers of its own says so by `changes_state` and names them in `own_state`. They load,
    train and travel like any other, without weight decay. The weights of an ANN do not hold them, see `complete`.

    Attributes:
        Settings: Dataclass of the variant's settings.
        kind: What it is a variant of: 'norm', 'residual', ...; set by `create_variant`.
        name: Its registered name; set by `create_variant`.
        changes_state: Whether a model's state dict has other keys or shapes with it.
        scales_currents: Whether it scales the neurons' currents at the start of training, which `calibrate` undoes.

    Args:
        settings: Fields of `Settings`, by name.

    Raises:
        ValueError: A setting is unknown or out of its range.
    """
    Settings = VariantSettings
    kind = 'variant'
    name = ''
    changes_state = False
    scales_currents = False

    def __init__(self, **settings: Any):
        self.settings = build(self.Settings, settings, f"variant '{type(self).__name__}'")

    def __str__(self) -> str:
        return f"{self.kind}='{self.name}'"

    def check(self, model: nn.Module, settings: Any) -> None:
        """Raise, before anything is changed, where the model lacks what the variant is about.

        Args:
            model: The model, spiking already or not.
            settings: Its SpikingSettings.

        Raises:
            ValueError: The variant does not fit; the message names the model's part.
        """

    def apply(self, model: nn.Module, settings: Any) -> None:
        """Change a spiking model in place; again where it has the variant already."""
        raise NotImplementedError

    def remove(self, model: nn.Module) -> None:
        """Undo `apply`, in place; a model without the variant stays as it is."""
        raise NotImplementedError

    def records(self, model: nn.Module) -> Sequence[Any]:
        """What became of every module that the variant is about: tuples that begin as VariantRecord does."""
        return ()

    def summary(self, model: nn.Module) -> str:
        """One line for the report; empty for none."""
        return ''

    def own_state(self, model: nn.Module) -> List[str]:
        """Names of the parameters and buffers that the model has by this variant only."""
        return []

    def complete(self, model: nn.Module, state_dict: Dict[str, torch.Tensor], prefix: str) -> None:
        """Make the state of a model without this variant, such as an ANN's, loadable, in place.

        By default the variant's own parameters and buffers keep the values that they have.

        Args:
            model: The model that the state is for.
            state_dict: What is loaded.
            prefix: Of the model's keys in it.
        """
        own = model.state_dict(keep_vars=True)
        for name in self.own_state(model):
            state_dict.setdefault(f'{prefix}{name}', own[name].detach())

    def zeros_stay(self, model: nn.Module) -> Set[str]:
        """Names of the modules whose scale of zero `calibrate` leaves: zero makes a block the identity there."""
        return set()
