"""Register neurons by name with a decorator, and create them."""
from functools import partial
from typing import Any, Callable, List, Type, Union

from timm_sscl.named import Registry

from .base import OUTPUTS, SpikingNeuron

__all__ = ['register_neuron', 'unregister_neuron', 'list_neurons', 'neuron_class', 'neuron_name', 'create_neuron']

_neurons: Registry[Type[SpikingNeuron]] = Registry('neuron')


def register_neuron(name: str) -> Callable[[Type[SpikingNeuron]], Type[SpikingNeuron]]:
    """Decorator that registers a subclass of SpikingNeuron by name: `neuron=NAME`, `train.py --neuron NAME`.

    Raises:
        TypeError: The decorated object is not a subclass of SpikingNeuron.
        ValueError: The name is taken, or the class has an unknown kind of output.
    """
    def decorate(cls: Type[SpikingNeuron]) -> Type[SpikingNeuron]:
        if not (isinstance(cls, type) and issubclass(cls, SpikingNeuron)):
            raise TypeError(f"register_neuron('{name}'): {cls!r} is no subclass of SpikingNeuron.")
        if cls.output not in OUTPUTS:
            raise ValueError(f"{cls.__name__}.output={cls.output!r}: must be one of {', '.join(OUTPUTS)}.")
        return _neurons.register(name, cls)

    return decorate


def unregister_neuron(name: str) -> None:
    """Remove a neuron."""
    _neurons.unregister(name)


def list_neurons() -> List[str]:
    """Return the names of the registered neurons."""
    return _neurons.names()


def neuron_class(name: str) -> Type[SpikingNeuron]:
    """Return the class registered by a name.

    Raises:
        ValueError: There is none.
    """
    return _neurons.get(name)


def neuron_name(neuron: Union[str, Type[SpikingNeuron]]) -> str:
    """Return the registered name of a neuron.

    Raises:
        ValueError: It is not registered.
    """
    if isinstance(neuron, str):
        neuron_class(neuron)
        return neuron
    return _neurons.name_of(neuron)


def create_neuron(neuron: Union[str, Type[SpikingNeuron], partial], timesteps: int, **settings: Any) -> SpikingNeuron:
    """Create a neuron from a name, a class, or a partial of a class, as timm does for `act_layer`.

    Args:
        neuron: Registered name, subclass of SpikingNeuron, or a partial of one.
        timesteps: Number of timesteps T.
        settings: Fields of the neuron's Settings.

    Raises:
        ValueError: The name or a setting is unknown, or a value is out of range.
    """
    create = neuron_class(neuron) if isinstance(neuron, str) else neuron
    return create(timesteps, **settings)
