"""Draw the figures of a report: curves over epochs, accuracy against T, rasters of several images, errors."""
from typing import Any, Dict, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch

from .extra import from_extra
from .plots import PALETTE, STUDENT, TEACHER, plot_raster
from .spikes import SpikeRecord

__all__ = ['Curve', 'Picture', 'new_figure', 'draw_curves', 'draw_terms', 'draw_layers', 'draw_timesteps',
           'draw_rasters', 'draw_confusion', 'draw_pictures', 'draw_groups']

_STYLES = '-', '--', ':', '-.'
_MOST_NUMBERS = 20  # number of classes up to which a confusion matrix has its counts written in


class Curve(NamedTuple):
    """A value over the epochs."""
    label: str
    epochs: Sequence[float]  # counted from 1
    values: Sequence[float]


class Picture(NamedTuple):
    """An image of the data and what is written above it."""
    image: torch.Tensor  # (H, W) or (H, W, 3) in [0, 1]
    title: str


def new_figure(width: float, height: float) -> Any:
    """Return a figure of this size in inches that no window shows."""
    return from_extra('matplotlib.figure').Figure((width, height), layout='constrained')


def draw_curves(panels: Mapping[str, Sequence[Curve]]) -> Any:
    """Draw curves of the student and the teacher, one panel per quantity.

    Args:
        panels: Quantity -> its curves. Labels start with 'student' or 'teacher', and end with 'training' or
            'validation'; those of the training are dashed.
    """
    figure = new_figure(5 * len(panels), 3.4)
    for ax, (quantity, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for curve in curves:
            color = TEACHER if curve.label.startswith('teacher') else STUDENT
            style = '--' if curve.label.endswith('training') else '-'
            ax.plot(curve.epochs, curve.values, style, color=color, marker='.', label=curve.label)
        ax.set(xlabel='epoch', ylabel=quantity)
        _whole_epochs(ax)
        ax.legend(fontsize=8)
    return figure


def draw_terms(curves: Sequence[Curve]) -> Any:
    """Draw the terms of the loss over the epochs, one panel each, since their scales differ."""
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure = new_figure(4 * columns, 2.8 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax, curve in zip(axes, curves):
        ax.plot(curve.epochs, curve.values, color=STUDENT, marker='.')
        ax.set(xlabel='epoch', title=curve.label)
        _whole_epochs(ax)
    for ax in axes[len(curves):]:
        ax.set_visible(False)
    return figure


def draw_layers(panels: Mapping[str, Sequence[Curve]]) -> Any:
    """Draw a value per layer over the epochs, one panel per quantity; a layer has the same colour in all."""
    figure = new_figure(4.2 * len(panels), 3.6)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    names = list(dict.fromkeys(curve.label for curves in panels.values() for curve in curves))
    for ax, (quantity, curves) in zip(axes, panels.items()):
        for curve in curves:
            i = names.index(curve.label)
            ax.plot(curve.epochs, curve.values, _STYLES[i // len(PALETTE) % 4], color=PALETTE[i % len(PALETTE)],
                    marker='.', label=curve.label)
        ax.set(xlabel='epoch', title=quantity)
        _whole_epochs(ax)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=min(6, len(names)), fontsize=8)
    return figure


def draw_timesteps(timesteps: Sequence[int], panels: Mapping[str, Sequence[float]], own: int) -> Any:
    """Draw quantities against the number of timesteps T. The model's own T is marked."""
    figure = new_figure(3.6 * len(panels), 3.2)
    for ax, (quantity, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        ax.plot(timesteps, values, color=STUDENT, marker='o')
        ax.axvline(own, color='#999999', linestyle=':', label=f'trained with T={own}')
        ax.set(xlabel='timesteps T', title=quantity, ylim=(0, 1.15 * max(values) or 1))
        ax.set_xticks(list(timesteps))
        ax.legend(fontsize=8, loc='lower right')
    return figure


def draw_rasters(record: SpikeRecord, pictures: Sequence[Picture], neurons: int = 24) -> Any:
    """Draw the spikes of several images side by side, every image above its raster.

    Args:
        record: Spikes of one forward of the images, in this order.
        pictures: The images.
        neurons: At most so many neurons of every layer.
    """
    layers = len(record.layers)
    figure = new_figure(1.5 + 1.05 * len(pictures), min(16., 2. + .22 * layers + .01 * layers * neurons))
    height = figure.get_figheight() - 1.
    axes = figure.subplots(2, len(pictures), squeeze=False, height_ratios=[1., height])
    for i, picture in enumerate(pictures):
        show_picture(axes[0][i], picture)
        plot_raster(record, axes[1][i], image=i, neurons=neurons)
        if i:
            axes[1][i].set_yticklabels([])
    return figure


def draw_confusion(counts: torch.Tensor, classes: Sequence[str]) -> Any:
    """Draw a confusion matrix as shares of every true class; counts are written in up to 20 classes.

    Args:
        counts: (K, K), the true class by row, the predicted one by column.
        classes: Names of the classes.
    """
    n = len(counts)
    side = min(12., 3. + .32 * n)
    figure = new_figure(side + 1, side)
    ax = figure.subplots()
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    image = ax.imshow(shares.numpy(), cmap='cividis', vmin=0, vmax=1, interpolation='nearest')
    if n <= _MOST_NUMBERS:
        for i, j in (counts > 0).nonzero().tolist():
            ax.text(j, i, int(counts[i, j]), ha='center', va='center', fontsize=8,
                    color='black' if shares[i, j] > .5 else 'white')
    every = -(-n // 60)
    ax.set_xticks(range(0, n, every), classes[::every], rotation=90, fontsize=8)
    ax.set_yticks(range(0, n, every), classes[::every], fontsize=8)
    ax.set(xlabel='predicted class', ylabel='true class')
    figure.colorbar(image, ax=ax, label='share of the true class')
    return figure


def draw_pictures(pictures: Sequence[Picture], columns: int = 6) -> Any:
    """Draw images in a grid, each with its title."""
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    figure = new_figure(1.9 * columns, 2.3 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax, picture in zip(axes, pictures):
        show_picture(ax, picture)
    for ax in axes[len(pictures):]:
        ax.set_visible(False)
    return figure


def draw_groups(curves: Mapping[str, Tuple[Sequence[float], Sequence[float], Sequence[Optional[float]]]],
                finals: Mapping[str, Sequence[float]]) -> Any:
    """Draw groups of runs: the mean accuracy over the epochs with its interval, and every run's last accuracy.

    Args:
        curves: Group -> (epochs, means, half widths of the intervals, None for a single run).
        finals: Group -> accuracy of every run.
    """
    figure = new_figure(11, 3.8)
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    for i, (name, (epochs, means, halves)) in enumerate(curves.items()):
        color, style = PALETTE[i % len(PALETTE)], _STYLES[i // len(PALETTE) % 4]
        left.plot(epochs, means, style, color=color, marker='.', label=name)
        band = [(e, m - h, m + h) for e, m, h in zip(epochs, means, halves) if h is not None]
        if band:
            at, low, high = zip(*band)
            left.fill_between(at, low, high, color=color, alpha=.2, linewidth=0)
    low, high = left.get_ylim()  # an interval may exceed 0 and 100
    left.set(xlabel='epoch', ylabel='top-1 in percent', ylim=(max(low, -2.), min(high, 102.)))
    _whole_epochs(left)
    left.legend(fontsize=8)
    for i, values in enumerate(finals.values()):
        right.plot(values, [i] * len(values), 'o', color=PALETTE[i % len(PALETTE)], alpha=.6)
        right.plot([sum(values) / len(values)], [i], '|', color='black', markersize=18)
    right.set_yticks(range(len(finals)), list(finals), fontsize=8)
    right.set(ylim=(len(finals) - .5, -.5), xlabel='top-1 after the last epoch in percent (bar: mean)')
    return figure


def show_picture(ax: Any, picture: Picture) -> None:
    """Show an image with its title, without axes."""
    shown: Dict[str, Any] = dict(cmap='gray', vmin=0, vmax=1) if picture.image.ndim == 2 else {}
    ax.imshow(picture.image.numpy(), interpolation='nearest', **shown)
    ax.set_title(picture.title, fontsize=8)
    ax.set_axis_off()


def _whole_epochs(ax: Any) -> None:
    ax.xaxis.set_major_locator(from_extra('matplotlib.ticker').MaxNLocator(integer=True, min_n_ticks=1))
