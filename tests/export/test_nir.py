"""to_nir and from_nir: against a float64 simulation of NIR's definitions, and through other tools' importers."""
import copy
from importlib.metadata import version

import nir
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from packaging.version import Version

from timm_sscl import calibrate, convert_to_spiking, fold_gains, fold_norms, record_spikes
from timm_sscl.export import deploy, from_nir, to_nir

T, DT = 4, 1e-4


class _Net(nn.Module):
    """Convolutions with norms, average pooling, a residual sum and a linear map."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.act1 = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        self.pool, self.block = nn.AvgPool2d(2, ceil_mode=True), nn.Module()
        self.block.conv, self.block.bn, self.block.act = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.gap, self.fc1, self.act2 = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 6, bias=False), nn.ReLU()
        self.drop, self.fc2 = nn.Dropout(.5), nn.Linear(6, 3)

    def forward(self, x):
        x = self.pool(self.act1(self.bn1(self.conv1(x))))
        x = self.block.act(self.block.bn(self.block.conv(x)) + x)
        return self.fc2(self.drop(self.act2(self.fc1(self.gap(x).flatten(1)))))


def _spiking(net=_Net, **kwargs):
    torch.manual_seed(1)
    model = convert_to_spiking(net(), T, input_size=(2, 8, 8), **kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=.1)
            module.running_var.uniform_(.5, 1)
    return model.eval()


def _calibrated(**kwargs):
    model = _spiking(**kwargs)
    images = torch.randn(5, 2, 8, 8)
    return calibrate(model, images), images


# ---- NIR's definitions in float64

_MAPS = {
    'Affine': lambda n, x: x @ n.weight.T + n.bias,
    'Linear': lambda n, x: x @ n.weight.T,
    'Flatten': lambda n, x: x.flatten(1),
    'AvgPool2d': lambda n, x: F.avg_pool2d(x, *(tuple(int(v) for v in value) for value in (n.kernel_size, n.stride))),
    'Conv2d': lambda n, x: F.conv2d(x, n.weight, n.bias, tuple(n.stride), tuple(n.padding), tuple(n.dilation)),
    'Output': lambda n, x: x,
}


class _Float64:
    """The parameters of a node as float64 tensors."""

    def __init__(self, node):
        for name, value in vars(node).items():
            integer = not isinstance(value, np.ndarray) or value.dtype.kind in 'iu'
            setattr(self, name, value if integer else torch.from_numpy(value.astype(np.float64)))


def simulate(graph, images, dt, strict=True):
    """Run a graph for T Euler steps on the same images.

    Returns:
        Mean output, spikes (T, B, ...) of every neuron node, and the least distance of a potential to its threshold.
    """
    nodes = {name: _Float64(node) for name, node in graph.nodes.items()}
    potentials, spikes, outputs, margin = {}, {}, [], np.inf
    for _ in range(T):
        values = {'input': images.double()}
        for name, node in graph.nodes.items():  # in the order of computation
            if name == 'input':
                continue
            x, n, kind = sum(values[a] for a, b in graph.edges if b == name), nodes[name], type(node).__name__
            if kind not in ('LIF', 'IF'):
                values[name] = _MAPS[kind](n, x)
                continue
            v = potentials.get(name, torch.zeros_like(x))
            v = v + dt * ((n.v_leak - v + n.r * x) / n.tau if kind == 'LIF' else n.r * x)
            margin = min(margin, (v - n.v_threshold).abs().min().item())
            fired = v > n.v_threshold if strict else v >= n.v_threshold
            potentials[name] = torch.where(fired, n.v_reset, v)
            values[name] = fired.double()
            spikes.setdefault(name, []).append(fired)
        outputs.append(values['output'])
    return torch.stack(outputs).mean(0), {name: torch.stack(s) for name, s in spikes.items()}, margin


@pytest.mark.parametrize('options', [{}, dict(tau=.9, v_threshold=.75), dict(neuron='if'), dict(tau=1.)],
                         ids=['paper', 'tau', 'if', 'no leak'])
@torch.no_grad()
def test_a_graph_means_what_the_network_computes(options):
    model, images = _calibrated(**options)
    graph = to_nir(model, images, dt=2e-3)
    mean, spikes, margin = simulate(graph, images, 2e-3)
    with record_spikes(model) as record:
        out = model(images)
    assert margin > 1e-5  # no tie: float32 rounding of potentials below 10 is under 1e-6
    assert set(spikes) == {'act1', 'block.act', 'act2'}
    assert all(torch.equal(record[name], fired) for name, fired in spikes.items())
    assert 0 < record['act2'].float().mean() < 1
    torch.testing.assert_close(out.double(), mean, rtol=1e-5, atol=1e-5)


def test_parameters_are_translated():
    model = _spiking(tau=.2, v_threshold=.5)
    model.block.act.set_gain(torch.tensor(.25))  # behind a sum: it stays in the neuron
    nodes = to_nir(model, torch.zeros(1, 2, 8, 8)).nodes
    expected = dict(tau=DT / .8, r=1.25, v_leak=0, v_reset=0)
    for name, threshold in (('act1', .5), ('block.act', 2.)):
        assert nodes[name].tau.shape == {'act1': (4, 8, 8), 'block.act': (4, 4, 4)}[name]
        for key, value in dict(expected, v_threshold=threshold).items():
            np.testing.assert_allclose(getattr(nodes[name], key), value, rtol=1e-15)


@torch.no_grad()
def test_a_potential_at_the_threshold_fires_here_only():
    model = convert_to_spiking(nn.Sequential(nn.Linear(1, 1), nn.ReLU()), T, tau=.5, input_size=(1,))
    model[0].weight.data.fill_(1.)
    model[0].bias.data.zero_()
    graph, x = to_nir(model, torch.zeros(1, 1)), torch.full((1, 1), .5)
    assert model(x).item() == 1 and simulate(graph, x, DT)[0].item() == .5  # potentials .5, .75 (fires), .5, .75
    assert simulate(graph, x, DT, strict=False)[0].item() == 1


# ---- there and back

def _same(graph, other):
    assert list(graph.nodes) == list(other.nodes) and graph.edges == other.edges
    for name, node in graph.nodes.items():
        assert type(node) is type(other.nodes[name])
        for key, value in vars(node).items():
            if isinstance(value, np.ndarray):
                assert np.array_equal(value, getattr(other.nodes[name], key)), (name, key)
                assert value.dtype == getattr(other.nodes[name], key).dtype


@pytest.mark.parametrize('options', [{}, dict(tau=1 / 3), dict(neuron='if', neuron_kwargs=dict(v_threshold=.7))],
                         ids=['paper', 'third', 'if'])
@torch.no_grad()
def test_round_trip_is_exact(options, tmp_path):
    model, images = _calibrated(**options)
    before = copy.deepcopy(model.state_dict())
    graph = to_nir(model, images)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    nir.write(tmp_path / 'net.nir', graph)
    with pytest.raises(FileNotFoundError, match="graph: there is no file '.*other.nir'"):
        from_nir(tmp_path / 'other.nir')
    again = from_nir(str(tmp_path / 'net.nir')).eval()
    folded = fold_norms(fold_gains(copy.deepcopy(model), images), images)
    with record_spikes(folded) as expected, record_spikes(again) as record:
        assert torch.equal(folded(images), again(images))
    assert all(torch.equal(expected[name], record[name]) for name in expected.layers)
    assert again.timesteps == T and type(again.act1) is type(model.act1)
    assert again.act1.settings.tau == model.act1.settings.tau
    _same(graph, to_nir(again, images))
    with torch.enable_grad():
        again.train()(images).sum().backward()
    assert again.conv1.weight.grad.abs().sum() > 0


def test_frames_and_a_shared_stem_give_the_same_graph():
    model, images = _calibrated()
    graph = to_nir(model, images)
    _same(graph, to_nir(model, images[:, None].repeat(1, T, 1, 1, 1)))
    _same(graph, to_nir(copy.deepcopy(model).set_stem('act1').train(), images))


# ---- other tools

def _run(imported, images):
    """Mean output of T steps, and spikes by the names of their modules."""
    spikes, state, outputs = {}, (), []
    for name, module in imported.named_children():
        if 'act' in name:
            module.register_forward_hook(lambda m, args, out, name=name: spikes.setdefault(name, []).append(
                out[0] if isinstance(out, tuple) else out))
    for _ in range(T):
        out, *state = imported(images, *state)
        outputs.append(out)
    return torch.stack(outputs).mean(0), {name: torch.stack(s).bool() for name, s in spikes.items()}


_TOOLS = {  # tool -> module of its importer, and the version on which the page's table was measured
    'spikingjelly': ('spikingjelly.activation_based.nir_exchange.from_nir', '2.0'),
    'snntorch': ('snntorch.import_nir', '1.0')}


def _importer(tool):
    pytest.importorskip('nirtorch')
    module, oldest = _TOOLS[tool]
    found = pytest.importorskip(module)
    if Version(version(tool)) < Version(oldest):
        pytest.skip(f'{tool} {version(tool)} reads NIR in another way')
    return found.import_from_nir


@pytest.mark.parametrize('tool', ['spikingjelly', 'snntorch'])
@torch.no_grad()
def test_other_tools_fire_the_same_spikes(tool):
    import_from_nir = _importer(tool)
    model, images = _calibrated()
    with record_spikes(model) as record:
        out = model(images)
    mean, spikes = _run(import_from_nir(to_nir(model, images)), images)
    assert set(spikes) == {'act1', 'block_act', 'act2'}  # no dots in their names
    assert all(torch.equal(record[name.replace('_', '.')], fired) for name, fired in spikes.items())
    torch.testing.assert_close(mean, out, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_they_do_with_integrate_and_fire_neurons():
    """The page on export says so."""
    importers = {tool: _importer(tool) for tool in _TOOLS}
    model, images = _calibrated(neuron='if')
    with record_spikes(model) as record:
        model(images)
    _, spikes = _run(importers['spikingjelly'](to_nir(model, images)), images)
    assert all(torch.equal(record[name.replace('_', '.')], fired) for name, fired in spikes.items())
    with pytest.raises(AssertionError, match='r != 1'):
        importers['snntorch'](to_nir(model, images))
    leaky = importers['snntorch'](to_nir(model, images, dt=1.)).act1
    assert leaky.beta == torch.tensor(.9) and leaky.reset_mechanism == 'subtract'


@torch.no_grad()
def test_a_graph_of_spikingjelly_is_read():
    _importer('spikingjelly')
    from spikingjelly.activation_based import layer, neuron
    from spikingjelly.activation_based.nir_exchange.to_nir import export_to_nir
    torch.manual_seed(0)
    theirs = nn.Sequential(layer.Conv2d(2, 3, 3), neuron.LIFNode(tau=2., v_threshold=.4), layer.Flatten(),
                           layer.Linear(108, 5), neuron.LIFNode(tau=2., v_threshold=.3), layer.Linear(5, 2))
    images = torch.randn(4, 2, 8, 8)
    expected = torch.stack([theirs(images) for _ in range(T)]).mean(0)
    for module in (theirs[1], theirs[4]):
        module.reset()
    ours = from_nir(export_to_nir(theirs, images[:1]), timesteps=T).eval()
    assert {neuron.settings.tau for neuron in ours.neurons().values()} == {.5}
    torch.testing.assert_close(ours(images), expected)


# ---- refusals

class _Layers(nn.Module):
    """A convolution, a neuron, a module of the test's, and a linear map of the flattened rest."""

    def __init__(self, middle=nn.Identity(), conv=nn.Conv2d, **options):
        super().__init__()
        self.conv, self.act, self.middle = conv(2, 4, 3, padding=1, **options), nn.ReLU(), middle
        self.fc = nn.LazyLinear(3)
        self(torch.zeros(1, 2, 8, 8))

    def forward(self, x):
        return self.fc(self.middle(self.act(self.conv(x))).flatten(1))


class _Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize('make, text', [
    (lambda: _spiking(v_reset='soft'), 'act1: soft reset'),
    (lambda: _spiking(v_reset=.1), 'v_reset=0.1'),
    (lambda: _spiking(v_init=.25), 'v_init=0.25'),
    (lambda: _spiking(neuron='plif'), 'PLIF has no node'),
    (lambda: _spiking(neuron='ternary'), 'Ternary has no node'),
    (lambda: _spiking(norm='tebn'), 'timestep'),
    (lambda: _spiking(norm='bntt'), 'weights per timestep'),
    (lambda: _spiking(norm='mpbn'), 'has no node'),
    (lambda: _spiking(lambda: _Layers(nn.MaxPool2d(2))), 'max_pool2d in middle: NIR has no max pooling'),
    (lambda: _spiking(lambda: _Layers(nn.Softmax(1)), allow_analog=True), 'softmax in middle: NIR has no softmax'),
    (lambda: _spiking(lambda: _Layers(_Function(lambda x: F.scaled_dot_product_attention(x, x, x)))), 'attention'),
    (lambda: _spiking(lambda: _Layers(nn.LayerNorm(8))), 'layer_norm in middle: NIR has no norms'),
    (lambda: _spiking(lambda: _Layers(nn.AvgPool2d(3, ceil_mode=True))), 'ceil_mode'),
    (lambda: _spiking(lambda: _Layers(_Function(lambda x: x.permute(0, 2, 3, 1)))), 'NIR has Flatten only'),
    (lambda: _spiking(lambda: _Layers(_Function(lambda x: x + x))), 'layer twice'),
    (lambda: _spiking(lambda: _Layers(_Function(lambda x: x + 1.))), 'no constants'),
    (lambda: _spiking(lambda: _Layers(groups=2)), 'groups=2'),
    (lambda: deploy(_spiking(), torch.zeros(1, 2, 8, 8)), 'deployed in int8'),
    (lambda: _Net(), 'does not spike'),
], ids=lambda value: value if isinstance(value, str) else '')
def test_what_has_no_equal_is_named(make, text):
    with pytest.raises(ValueError, match=text):
        to_nir(make(), torch.zeros(1, 2, 8, 8))


def test_thresholds_per_channel_and_amplitudes_are_named():
    images = torch.zeros(1, 2, 8, 8)
    model = _spiking()
    model.block.act.set_gain(torch.tensor([1., 2., 3., 4.]).view(4, 1, 1))  # behind a sum, it does not fold
    with pytest.raises(ValueError, match='block.act: it has a gain per channel, that is thresholds per channel'):
        to_nir(model, images)
    model.block.act.set_gain(torch.tensor(-1.))
    with pytest.raises(ValueError, match='below its threshold'):
        to_nir(model, images)
    model.block.act.set_gain(None)
    model.act1.set_gain(None, torch.tensor(2.))  # the sum behind it takes the spikes
    with pytest.raises(ValueError, match='act1: its spikes are multiplied by a scale'):
        to_nir(model, images)


@pytest.mark.parametrize('dt', [0., -1., float('nan')])
def test_dt_is_checked(dt):
    with pytest.raises(ValueError, match='dt='):
        to_nir(_spiking(), torch.zeros(1, 2, 8, 8), dt=dt)


def _graph(*nodes, edges=None):
    names = dict(input=nir.Input([2]), **{f'n{i}': node for i, node in enumerate(nodes)}, output=nir.Output([2]))
    keys = list(names)
    return nir.NIRGraph(names, edges or list(zip(keys, keys[1:])), type_check=False)


def _lif(tau=2e-4, v_threshold=1., **values):
    arrays = {**dict(tau=tau, r=1., v_leak=0., v_threshold=v_threshold, v_reset=0.), **values}
    return nir.LIF(**{name: np.broadcast_to(np.float64(value), 2) for name, value in arrays.items()})


@pytest.mark.parametrize('graph, text', [
    (_graph(_lif(v_leak=.1)), "'n0' .LIF.: v_leak=0.1"),
    (_graph(_lif(v_reset=-.1)), 'v_reset=-0.1'),
    (_graph(_lif(v_threshold=[1., 2.])), 'v_threshold differs between neurons'),
    (_graph(_lif(v_threshold=-1.)), 'must be positive'),
    (_graph(_lif(tau=5e-5)), 'tau=5e-05: must be at least dt'),
    (_graph(_lif(), _lif(tau=3e-4)), 'different decay factors'),
    (_graph(nir.Scale(np.ones(2)), _lif()), "'n0' .Scale.: not supported"),
    (_graph(nir.Linear(np.eye(2))), 'no neurons'),
    (_graph(_lif(), edges=[('input', 'n0'), ('n0', 'n0'), ('n0', 'output')]), 'recurrent'),
    (_graph(_lif(), edges=[('n0', 'output')]), "'n0' has no input"),
    ('other', "there is no file 'other'"),
], ids=lambda value: value if isinstance(value, str) else '')
def test_graphs_that_are_not_read(graph, text):
    with pytest.raises((ValueError, OSError), match=text):
        from_nir(graph, timesteps=2)


def test_timesteps_names_and_thresholds_of_a_foreign_graph():
    graph = _graph(nir.Linear(np.eye(2, dtype=np.float32)), _lif(), _lif(v_threshold=.25, r=2.))
    with pytest.raises(ValueError, match='timesteps: the graph does not say'):
        from_nir(graph)
    model = from_nir(graph, timesteps=2).eval()
    # tau = 2 dt: v = v / 2 + r I / 2. The second layer's threshold and resistance become a gain
    gains = [neuron.gain.item() for neuron in model.neurons().values()]
    assert gains == [.5, 4.] and model.n1.settings.v_threshold == 1 and model.n1.settings.tau == .5
    graph.nodes['forward'] = graph.nodes.pop('n0')
    graph.edges = [tuple('forward' if name == 'n0' else name for name in edge) for edge in graph.edges]
    with pytest.raises(ValueError, match="node 'forward'"):
        from_nir(graph, timesteps=2)
