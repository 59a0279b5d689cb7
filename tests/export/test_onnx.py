"""to_onnx: onnxruntime computes what the model does, for any batch size."""
import copy

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn as nn
from packaging.version import Version
from sklearn.datasets import load_digits

from timm_sscl import calibrate, convert_to_spiking, list_neurons
from timm_sscl.export import to_onnx

T, K = 3, 4

pytestmark = pytest.mark.skipif(
    Version(torch.__version__) < Version('2.14'), reason="torch 2.6's exporter fails at batch norms; 2.14's is run")


class _Net(nn.Module):
    """A residual network that also returns its spikes."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.act1 = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4, eps=1e-30), nn.ReLU()
        self.conv2, self.act2, self.pool = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        self.fc = nn.Linear(4 * 9, K)

    def forward(self, x):
        x = self.act1(self.bn1(self.conv1(x)))
        y = self.act2(self.conv2(x) + x)
        return {'logits': self.fc(self.pool(y).flatten(1)), 'act1': x, 'act2': y}


class _Small(nn.Module):
    """One neuron layer and a function behind it."""

    def __init__(self, last=lambda x: x):
        super().__init__()
        self.conv, self.act, self.fc, self.last = nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Linear(4, K), last

    def forward(self, x):
        return self.last(self.fc(self.act(self.conv(x)).mean((2, 3))))


def _dyadic(generator):
    """The residual network with weights k / 2^m, so that no sum of it is rounded in float32."""
    model = _Net()
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            p.data = torch.randint(-4, 5, p.shape, generator=generator) / 16
    model.bn1.running_var.fill_(.25)
    model.bn1.weight.data.fill_(1.)
    return convert_to_spiking(model, T, tau=.5, input_size=(2, 6, 6))


def _small(last=lambda x: x, **kwargs):
    torch.manual_seed(0)
    return convert_to_spiking(_Small(last), T, input_size=(2, 6, 6), **kwargs)


def _session(path):
    return onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])


@torch.no_grad()
def test_dyadic_network_gives_identical_spikes_for_every_batch_size(tmp_path, caplog):
    generator = torch.Generator().manual_seed(0)
    model = _dyadic(generator)
    model.train()
    model.act1.register_forward_hook(lambda *args: None)
    before = copy.deepcopy(model.state_dict())
    images = torch.randint(-8, 9, (8, 2, 6, 6), generator=generator) / 8
    report = to_onnx(model, tmp_path / 'net.onnx', images[:2], per_step=True)
    assert model.training and len(model.act1._forward_hooks) == 1
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert 'act1 were left out' in caplog.text
    assert report.timesteps == T and report.difference == 0 and report.checked == 2
    assert report.inputs == {'images': ('batch', 2, 6, 6)} and f'timesteps={T} in the graph' in str(report)
    session = _session(tmp_path / 'net.onnx')
    assert session.get_modelmeta().custom_metadata_map['timesteps'] == str(T)
    model.eval()
    for batch in (1, T, 8):
        expected = model(images[:batch], per_step=True)
        for (name, value), array in zip(expected.items(), session.run(None, {'images': images[:batch].numpy()})):
            assert f'output_{name}' in report.outputs and torch.equal(torch.from_numpy(array), value), name
    assert all(.05 < expected[name].mean() < .95 for name in ('act1', 'act2'))  # neither silent nor always firing


def _train_on_digits():
    """A tiny network, and 360 images that it was not trained on."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(digits.target)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2),
                        nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 9, 10))
    model = convert_to_spiking(net, 2, input_size=(1, 8, 8))
    optimizer = torch.optim.Adam(model.parameters(), lr=.01)
    for step in range(60):
        chosen = torch.arange(step * 64, step * 64 + 64) % 1437
        loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), images[1437:], labels[1437:]


@torch.no_grad()
def test_trained_network_gives_the_same_classes(tmp_path):
    with torch.enable_grad():
        model, images, labels = _train_on_digits()
    report = to_onnx(model, tmp_path / 'digits.onnx', images[:8])
    logits, = _session(tmp_path / 'digits.onnx').run(None, {'images': images.numpy()})
    predicted = model(images).argmax(1)
    assert (predicted == labels).float().mean() > .7  # 10 classes: it has learned
    assert np.mean(logits.argmax(1) == predicted.numpy()) >= .995  # float32 rounding may flip a spike
    assert report.agreement == 1 and 'same class for 100.0%' in str(report)


@torch.no_grad()
def test_event_frames_and_a_warning_where_outputs_differ(tmp_path, caplog, monkeypatch):
    model = _small().eval()
    frames = 3 * torch.randn(4, T, 2, 6, 6)
    real = onnxruntime.InferenceSession.run
    monkeypatch.setattr(onnxruntime.InferenceSession, 'run',
                        lambda self, names, feed: [array + .1 for array in real(self, names, feed)])
    report = to_onnx(model, tmp_path / 'events.onnx', frames)
    assert report.difference > .01 and 'differ from the model by up to' in caplog.text
    assert report.inputs == {'images': ('batch', T, 2, 6, 6)}
    monkeypatch.undo()
    out, = _session(tmp_path / 'events.onnx').run(None, {'images': frames.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), model(frames))
    with pytest.raises(ValueError, match=f'{T + 1} frames.*timesteps={T}'):
        to_onnx(model, tmp_path / 'more.onnx', torch.zeros(2, T + 1, 2, 6, 6))


_QUICK = 'ternary',  # with an amplitude; the LIF is everywhere in this file


@pytest.mark.parametrize('neuron', [
    pytest.param(name, marks=() if name in _QUICK else pytest.mark.families) for name in list_neurons()])
@torch.no_grad()
def test_every_neuron(neuron, tmp_path):
    model = _small(neuron=neuron).eval()
    images = 3 * torch.randn(6, 2, 6, 6)
    calibrate(model, images)
    to_onnx(model, tmp_path / 'net.onnx', images[:2])
    out, = _session(tmp_path / 'net.onnx').run(None, {'images': images.numpy()})
    # a spike more or less would change an output by 0.01: 48 neurons are averaged over
    torch.testing.assert_close(torch.from_numpy(out), model(images), rtol=0, atol=1e-4)


def _branches(x):
    return x if x.sum() > 0 else -x


@pytest.mark.parametrize('model, images, text', [
    (lambda: _Small(), torch.zeros(2, 2, 6, 6), '_Small does not spike'),
    (lambda: torch.compile(_small()), torch.zeros(2, 2, 6, 6), 'compiled by torch.compile'),
    (lambda: _small().double(), torch.zeros(2, 2, 6, 6), r'conv.weight is torch.float64.*\.float\(\)'),
    (lambda: _small(), torch.tensor(T), 'images: must be a batch'),
    (lambda: _small(), torch.zeros(0, 2, 6, 6), 'images: must be a batch'),
    (lambda: _small(_branches, allow_analog=True), torch.zeros(2, 2, 6, 6), 'torch.export does not trace.*Data'),
    (lambda: _small(torch.special.bessel_j0, allow_analog=True), torch.zeros(2, 2, 6, 6), 'bessel_j0'),
], ids=['ANN', 'compiled', 'double', 'timesteps', 'empty', 'data-dependent', 'no operator'])
def test_what_cannot_be_written_is_named(model, images, text, tmp_path):
    file = tmp_path / 'net.onnx'
    file.write_text('an older one')
    with pytest.raises(ValueError, match=text):
        to_onnx(model(), file, images)
    assert list(tmp_path.iterdir()) == [file] and file.read_text() == 'an older one'


def test_a_folder_that_is_missing_and_an_extra_that_is_missing(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match='no folder'):
        to_onnx(_small(), tmp_path / 'nowhere' / 'net.onnx', torch.zeros(2, 2, 6, 6))
    monkeypatch.setitem(__import__('sys').modules, 'onnx', None)  # import raises
    with pytest.raises(ImportError, match=r"onnx is not installed.*pip install 'timm_sscl\[export\]'"):
        to_onnx(_small(), tmp_path / 'net.onnx', torch.zeros(2, 2, 6, 6))
