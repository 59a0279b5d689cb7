"""ThresholdRule: base class of the rules that find thresholds, and their registry."""
from functools import partial
from typing import Any, Callable, List, Optional, Sequence, Type, Union

import torch

from timm_sscl.named import Registry

__all__ = ['ThresholdRule', 'register_threshold_rule', 'unregister_threshold_rule', 'list_threshold_rules',
           'rule_maker', 'by_channel', 'as_threshold']


class ThresholdRule:
    """Find the threshold of one neuron layer. One object per layer; `measure` is called once per call of the layer.

    Most rules run the model as the original ANN, on batches of images. A rule with `spiking` runs the spiking model
    over all T on all images at once. Layers are then measured in the order in which they run, each behind layers that
    spike with the thresholds found before.

    Attributes:
        spiking: Whether the layers before a layer spike when it is measured.
    """
    spiking = False

    def measure(self, x: torch.Tensor, axis: Optional[int]) -> None:
        """Take the values of one call into account.

        Args:
            x: Activations (N, ...) after the ReLU, or currents (T * N, ...) if the rule is `spiking`.
            axis: Channel axis of x for one threshold per channel; None for one threshold.
        """
        raise NotImplementedError

    def transmit(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the ANN's layer passes on for activations x, after `measure`. Not called if `spiking`."""
        return x

    def threshold(self) -> torch.Tensor:
        """Return the threshold so far: 0-d, or of a shape that broadcasts against a sample, (C, 1, 1) for maps."""
        raise NotImplementedError


Rule = Union[str, Type[ThresholdRule], partial]

_rules: Registry[Type[ThresholdRule]] = Registry('threshold rule')


def register_threshold_rule(name: str) -> Callable[[Type[ThresholdRule]], Type[ThresholdRule]]:
    """Decorator that registers a subclass of ThresholdRule: `convert_ann(model, images, rule=NAME)`.

    Raises:
        TypeError: The decorated object is not a subclass of ThresholdRule.
        ValueError: Another class has this name.
    """
    def decorate(cls: Type[ThresholdRule]) -> Type[ThresholdRule]:
        if not (isinstance(cls, type) and issubclass(cls, ThresholdRule)):
            raise TypeError(f"register_threshold_rule('{name}'): {cls!r} is no subclass of ThresholdRule.")
        return _rules.register(name, cls)

    return decorate


def unregister_threshold_rule(name: str) -> None:
    """Remove a threshold rule. Raises ValueError if there is none of this name."""
    _rules.unregister(name)


def list_threshold_rules() -> List[str]:
    """Return the names of the registered threshold rules, sorted."""
    return _rules.names()


def rule_maker(rule: Rule, also: Sequence[str] = ()) -> Callable[[], ThresholdRule]:
    """Return the class of a rule, or a partial of it, from a name, a class or a partial.

    Args:
        rule: The rule.
        also: Further names to list in the message.

    Raises:
        ValueError: No rule has this name.
        TypeError: rule is neither a name nor a subclass of ThresholdRule nor a partial of one.
    """
    if isinstance(rule, str) and rule not in _rules:
        raise ValueError(f"rule={rule!r}: must be one of {', '.join([*also, *_rules.names()])}; a plug-in may register "
                         f'others.')
    maker: Any = _rules.get(rule) if isinstance(rule, str) else rule
    cls = maker.func if isinstance(maker, partial) else maker
    if not (isinstance(cls, type) and issubclass(cls, ThresholdRule)):
        raise TypeError(f'rule={rule!r}: must be one of {", ".join(_rules.names())}, a subclass of ThresholdRule or a '
                        f'partial of one.')
    return maker


def by_channel(x: torch.Tensor, axis: Optional[int]) -> torch.Tensor:
    """Return x as rows: one per channel (C, n); one for the layer (1, n) without a channel axis beside the batch."""
    return x.reshape(1, -1) if axis is None or axis <= 0 else x.movedim(axis, 0).flatten(1)


def as_threshold(rows: torch.Tensor, x: torch.Tensor, axis: Optional[int]) -> torch.Tensor:
    """Return one value per row of `by_channel` in the shape of a threshold."""
    return rows[0] if axis is None or axis <= 0 else rows.view(-1, *(1,) * (x.ndim - 1 - axis))
