"""Pictures: what is drawn is what was measured, and nothing is drawn without the extra."""
import sys

import pytest
import timm
import torch
from matplotlib.figure import Figure

from timm_sscl import (
    FiringRates, cka_map, estimate_energy, plot_cka_map, plot_energy, plot_firing_rates, plot_raster, record_spikes)
from timm_sscl.report.figures import Curve, draw_curves

T = 3


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return timm.create_model('spiking_test_resnet', timesteps=T, num_classes=4, v_threshold=.2).eval()


@pytest.fixture(scope='module')
def images():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def ax():
    return Figure().subplots()


@torch.no_grad()
def test_a_raster_has_a_mark_per_spike(model, images, ax):
    with record_spikes(model) as record:
        model(images)
    layer = record.layers[1]
    assert plot_raster(record, ax, image=2, layers=[layer], neurons=10 ** 6) is ax
    marks = ax.collections[0].get_segments()
    spikes = record[layer][:, 2].flatten(1)
    assert 0 < len(marks) == int(spikes.sum())
    # a mark stands at its timestep, counted from 1, and its neuron's row
    drawn = {(round(mark[0][0]), round((mark[0][1] + mark[1][1]) / 2)) for mark in marks}
    assert drawn == {(t + 1, n) for t, n in spikes.nonzero().tolist()}
    assert [text.get_text() for text in ax.get_yticklabels()] == [layer]


@torch.no_grad()
def test_a_raster_of_all_layers_takes_some_neurons_of_each(model, images, ax):
    with record_spikes(model) as record:
        model(images)
    plot_raster(record, ax, neurons=7)
    assert [text.get_text() for text in ax.get_yticklabels()] == record.layers
    assert ax.get_ylim() == (7 * len(record.layers) - .5, -.5)  # every layer here has more than 7
    with pytest.raises(ValueError, match='image=5: the batch has 5 images'):
        plot_raster(record, ax, image=5)
    with pytest.raises(ValueError, match='neurons=0'):
        plot_raster(record, ax, neurons=0)


@torch.no_grad()
def test_rates_energy_and_similarity_are_drawn_as_measured(model, images):
    with FiringRates(model) as rates:
        model(images)
    ax = plot_firing_rates(rates, Figure().subplots())
    drawn = torch.tensor(ax.images[0].get_array().tolist())
    assert torch.equal(drawn, torch.tensor(list(rates.per_step().values()))) and drawn.shape[1] == T
    assert torch.equal(drawn, torch.tensor(plot_firing_rates(
        rates.per_step(), Figure().subplots()).images[0].get_array().tolist()))

    energy = estimate_energy(model, images)
    ax = plot_energy(energy, Figure().subplots())
    macs, additions, ann = ([bar.get_width() for bar in bars] for bars in ax.containers)
    assert sum(macs) + sum(additions) == pytest.approx(energy.spiking, rel=1e-9)
    assert sum(ann) == pytest.approx(energy.ann, rel=1e-9)

    similarity = cka_map(model, timm.create_model('test_resnet', num_classes=4), [images])
    ax = plot_cka_map(similarity, Figure().subplots())
    assert torch.equal(torch.tensor(ax.images[0].get_array().filled(0).tolist(), dtype=torch.float64),
                       similarity.values.nan_to_num(0.))
    assert [t.get_text() for t in ax.get_xticklabels()] == similarity.teacher
    assert [t.get_text() for t in ax.get_yticklabels()] == similarity.student


def test_without_axes_pyplots_current_ones_are_taken():
    from matplotlib import pyplot
    pyplot.switch_backend('agg')
    _, ax = pyplot.subplots()
    assert plot_firing_rates({'act1': [.1, .2]}) is ax
    pyplot.close('all')


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.partition('.')[0] == 'matplotlib']:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    with pytest.raises(ImportError, match=r"matplotlib is not installed.*pip install 'timm_sscl\[report\]'"):
        plot_firing_rates({'act1': [.1, .2]})


def test_no_rates_are_an_error(ax):
    with pytest.raises(ValueError, match='rates: no layer ran'):
        plot_firing_rates({}, ax)


@pytest.mark.parametrize('epochs', [[1], [1, 2], list(range(1, 31))])
def test_epochs_on_an_axis_are_whole(epochs):
    ax, = draw_curves({'loss': [Curve('student, validation', epochs, [.5] * len(epochs))]}).axes
    low, high = ax.get_xlim()
    ticks = [tick for tick in ax.get_xticks() if low <= tick <= high]
    assert ticks and all(tick == int(tick) for tick in ticks)
