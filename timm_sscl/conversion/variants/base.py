"""Variant: base class of options of a conversion that change more than the activation."""
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
        ValueError: A value is out of range.
    """

    def __post_init__(self):
        for field in fields(self):
            object.__setattr__(self, field.name, hashable(getattr(self, field.name)))
        self.check()

    def check(self) -> None:
        """Raise ValueError, naming the setting, if a value is out of range."""

    def at(self, timesteps: int) -> 'VariantSettings':
        """Return the settings completed for a conversion with T timesteps."""
        return self


@dataclass(frozen=True)
class PerStepSettings(VariantSettings):
    """Base of the settings of a variant with parameters per timestep.

    The parameters have `steps` entries, also after `set_timesteps`. Fewer timesteps use the first entries; more
    timesteps repeat the last.
    """
    steps: Optional[int] = knob(None, 'timesteps that have parameters (those of the conversion)', kw_only=True)

    def check(self) -> None:
        if self.steps is not None:
            check_timesteps(self.steps, 'steps')

    def at(self, timesteps: int) -> 'PerStepSettings':
        return replace(self, steps=timesteps) if self.steps is None else self


class VariantRecord(NamedTuple):
    """One module that a variant changed or left."""
    name: str
    was: str  # class before
    now: str  # class after, or the variant's name for it


class Variant:
    """Base of all variants. A variant has a `Settings` dataclass and changes a model in place.

    The settings of a model hold the variant's name and options, so checkpoints restore it. `apply` is called at the
    conversion, after every change of the settings, and after timm's `reset_classifier`. On a model that already has the
    variant it applies changed settings, keeps parameters, and changes new modules. `remove` undoes it.

    A variant with parameters or buffers of its own sets `changes_state` and names them in `own_state`. They are loaded,
    trained and saved like others, without weight decay. An ANN's weights lack them; see `complete`.

    Attributes:
        Settings: Dataclass of the variant's settings.
        kind: What the variant changes: 'norm', 'residual', ...; set by `create_variant`.
        name: Registered name; set by `create_variant`.
        changes_state: Whether a model's state dict has other keys or shapes with it.
        scales_currents: Whether it scales the neurons' currents at the start of training, which `calibrate` undoes.

    Args:
        settings: Fields of `Settings`, by name.

    Raises:
        ValueError: A setting is unknown or out of range, or the class lacks `apply` or `remove`.
    """
    Settings = VariantSettings
    kind = 'variant'
    name = ''
    changes_state = False
    scales_currents = False

    def __init__(self, **settings: Any):
        for method in ('apply', 'remove'):
            if getattr(type(self), method) is getattr(Variant, method):
                raise ValueError(f'{type(self).__name__} has no method {method}; a variant needs apply(self, model, '
                                 f'settings) and remove(self, model).')
        self.settings: Any = build(self.Settings, settings, f"variant '{type(self).__name__}'")

    def __str__(self) -> str:
        return f"{self.kind}='{self.name}'"

    def check(self, model: nn.Module, settings: Any) -> None:
        """Check that the model has the parts that the variant changes. Nothing has been changed yet.

        Args:
            model: The model, spiking or not.
            settings: Its SpikingSettings.

        Raises:
            ValueError: It does not. The message names the part.
        """

    def apply(self, model: nn.Module, settings: Any) -> None:
        """Change a spiking model in place. It may already have the variant."""
        raise NotImplementedError

    def remove(self, model: nn.Module) -> None:
        """Undo `apply` in place. A model without the variant is not changed."""
        raise NotImplementedError

    def records(self, model: nn.Module) -> Sequence[Any]:
        """Return what became of every module that the variant concerns: tuples that start with the fields of
        VariantRecord.
        """
        return ()

    def summary(self, model: nn.Module) -> str:
        """Return one line for the report, '' for none."""
        return ''

    def own_state(self, model: nn.Module) -> List[str]:
        """Return the names of the parameters and buffers that only this variant adds to the model."""
        return []

    def complete(self, model: nn.Module, state_dict: Dict[str, torch.Tensor], prefix: str) -> None:
        """Complete the state of a model without this variant, such as an ANN's, in place, so that it can be loaded.

        By default the variant's own parameters and buffers keep their values.

        Args:
            model: Model that loads the state.
            state_dict: State to load.
            prefix: Prefix of the model's keys in it.
        """
        own = model.state_dict(keep_vars=True)
        for name in self.own_state(model):
            state_dict.setdefault(f'{prefix}{name}', own[name].detach())

    def zeros_stay(self, model: nn.Module) -> Set[str]:
        """Return the names of modules whose scale of zero `calibrate` does not change, since it makes a block the
        identity.
        """
        return set()
