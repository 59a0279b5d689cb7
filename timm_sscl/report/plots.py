"""Draw spikes, firing rates, CKA maps and energy on matplotlib axes."""
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

from .energy import AC_PJ, MAC_PJ, Energy
from .extra import from_extra
from .firing import FiringRates
from .similarity import CKAMap
from .spikes import SpikeRecord

__all__ = ['plot_raster', 'plot_firing_rates', 'plot_cka_map', 'plot_energy', 'STUDENT', 'TEACHER', 'PALETTE']

# Okabe and Ito's colours, which colour-blind readers tell apart
PALETTE = '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000'
STUDENT, TEACHER = PALETTE[:2]
COLORS = 'cividis'  # colour map of rates and similarities
_MOST_LABELS = 60  # number of layers up to which every one has its name on an axis


def plot_raster(
        record: SpikeRecord,
        ax: Optional[Any] = None,
        image: int = 0,
        layers: Optional[Sequence[str]] = None,
        neurons: int = 40,
) -> Any:
    """Draw the spikes of one image: a row per neuron, a column per timestep, the layers from top to bottom.

    Args:
        record: Spikes of a forward, from `record_spikes`.
        ax: Axes to draw on; pyplot's current axes by default.
        image: Index of the image in the batch.
        layers: Names of the layers; by default all that ran, in their order.
        neurons: At most so many neurons of every layer, evenly spaced over it.

    Returns:
        The axes.

    Raises:
        ValueError: The batch has no such image, or `neurons` is below 1.
        KeyError: A layer did not run.
        ImportError: matplotlib is not installed.
    """
    if neurons < 1:
        raise ValueError(f'neurons={neurons}: must be 1 or more.')
    ax = _axes(ax)
    names = record.layers if layers is None else list(layers)
    first, centres, steps = 0, [], 0
    for i, name in enumerate(names):
        spikes = record.spikes(name)
        if not 0 <= image < spikes.shape[1]:
            raise ValueError(f'image={image}: the batch has {spikes.shape[1]} images.')
        fired = spikes[:, image].flatten(1)
        rows = _spaced(fired.shape[1], neurons)
        times, places = fired[:, rows].nonzero(as_tuple=True)
        if i % 2:
            ax.axhspan(first - .5, first + len(rows) - .5, color='#EEEEEE', linewidth=0, zorder=0)
        ax.vlines((times + 1).tolist(), (first + places - .45).tolist(), (first + places + .45).tolist(),
                  color=STUDENT, linewidth=3)
        centres.append(first + (len(rows) - 1) / 2)
        first, steps = first + len(rows), max(steps, len(fired))
    ax.set(xlim=(.5, steps + .5), ylim=(first - .5, -.5), xlabel='timestep')
    ax.set_xticks(_ticks(steps))
    _name_layers(ax, 'y', names, centres)
    return ax


def plot_firing_rates(rates: Union[FiringRates, Mapping[str, Sequence[float]]], ax: Optional[Any] = None) -> Any:
    """Draw the firing rate of every layer at every timestep as a map: a row per layer, a column per timestep.

    Args:
        rates: FiringRates after the forwards, or layer -> rate at every timestep (`FiringRates.per_step`).
        ax: Axes to draw on; pyplot's current axes by default.

    Returns:
        The axes.

    Raises:
        ValueError: There are no rates.
        ImportError: matplotlib is not installed.
    """
    layers = rates.per_step() if isinstance(rates, FiringRates) else {name: list(v) for name, v in rates.items()}
    if not layers:
        raise ValueError('rates: no layer ran.')
    ax = _axes(ax)
    steps = max(map(len, layers.values()))
    values = [[*row, *[float('nan')] * (steps - len(row))] for row in layers.values()]
    image = ax.imshow(values, aspect='auto', cmap=COLORS, vmin=0, interpolation='nearest',
                      extent=(.5, steps + .5, len(values) - .5, -.5))
    ax.set_xticks(_ticks(steps))
    ax.set_xlabel('timestep')
    _name_layers(ax, 'y', list(layers), list(range(len(layers))))
    ax.figure.colorbar(image, ax=ax, label='spikes per neuron')
    return ax


def plot_cka_map(similarity: CKAMap, ax: Optional[Any] = None) -> Any:
    """Draw the CKA of all layers of a student with all layers of a teacher as a map; undefined values are grey.

    Args:
        similarity: Result of `cka_map`.
        ax: Axes to draw on; pyplot's current axes by default.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    ax = _axes(ax)
    ax.set_facecolor('#BBBBBB')
    image = ax.imshow(similarity.values.numpy(), cmap=COLORS, vmin=0, vmax=1, interpolation='nearest', aspect='auto')
    _name_layers(ax, 'x', similarity.teacher, list(range(len(similarity.teacher))))
    _name_layers(ax, 'y', similarity.student, list(range(len(similarity.student))))
    ax.set(xlabel='layer of the teacher', ylabel='layer of the student')
    ax.figure.colorbar(image, ax=ax, label='CKA')
    return ax


def plot_energy(energy: Energy, ax: Optional[Any] = None) -> Any:
    """Draw the energy of every layer for one image, spiking and real-valued, as bars.

    Args:
        energy: Result of `estimate_energy`.
        ax: Axes to draw on; pyplot's current axes by default.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    ax = _axes(ax)
    names, layers = list(energy.layers), list(energy.layers.values())
    places = range(len(names))
    macs = [MAC_PJ * layer.macs * 1e-6 for layer in layers]
    ax.barh([i - .2 for i in places], macs, .38, color=PALETTE[4], label=f'spiking: MACs at {MAC_PJ} pJ')
    ax.barh([i - .2 for i in places], [AC_PJ * layer.additions * 1e-6 for layer in layers], .38, left=macs,
            color=STUDENT, label=f'spiking: additions at {AC_PJ} pJ')
    ax.barh([i + .2 for i in places], [layer.ann for layer in layers], .38, color='#999999',
            label=f'real-valued, one timestep: MACs at {MAC_PJ} pJ')
    longest = max([0., *(max(layer.spiking, layer.ann) for layer in layers)])
    ax.set(xlim=(0, 1.05 * longest or 1), ylim=(len(names) - .5, -.5), xlabel='microjoules per image')
    _name_layers(ax, 'y', names, list(places))
    ax.legend(fontsize=8)
    return ax


def _axes(ax: Optional[Any]) -> Any:
    """Return the axes, or pyplot's current ones."""
    return from_extra('matplotlib.pyplot').gca() if ax is None else ax


def _spaced(n: int, most: int) -> List[int]:
    """Return at most `most` indices, evenly spaced over range(n)."""
    count = min(n, most)
    return [i * n // count for i in range(count)]


def _ticks(steps: int) -> List[int]:
    """Return the timesteps, from 1, that have a tick."""
    return list(range(1, steps + 1, -(-steps // 10)))


def _name_layers(ax: Any, axis: str, names: Sequence[str], places: Sequence[float]) -> None:
    """Write the names of layers on an axis; of more than 60, every second, third, ..."""
    every = -(-len(names) // _MOST_LABELS)
    set_ticks: Dict[str, Any] = dict(x=ax.set_xticks, y=ax.set_yticks)
    rotation: Dict[str, Any] = dict(rotation=90) if axis == 'x' else {}
    set_ticks[axis](list(places)[::every], [name or '(model)' for name in names][::every], fontsize=7, **rotation)
