"""Axis 0 of every activation is the batch, and a sample moves only its own rows: known before anything is converted."""
import copy

import pytest
import timm
import torch
import torch.nn as nn

from timm_sscl import LIF, convert_to_spiking

T = 3


class _Base(nn.Module):
    """A convolution, an activation, a classifier; subclasses do something to the batch in between."""

    def __init__(self):
        super().__init__()
        self.conv, self.act, self.fc = nn.Conv2d(3, 4, 3), nn.GELU(), nn.Linear(4, 5)

    def between(self, x):
        return x

    def forward(self, x):
        return self.fc(self.act(self.between(self.conv(x))).mean((2, 3)))


class _Flips(_Base):
    def between(self, x):
        return x + x.flip(0)


class _Rolls(_Base):
    def between(self, x):
        return x + x.roll(1, 0)


class _Means(_Base):
    def between(self, x):
        return x - x.mean(0)


class _ShiftsSegments(_Base):
    """As a temporal shift module does: 4 rows are one clip."""

    def between(self, x):
        clips = x.unflatten(0, (-1, 4))
        return torch.cat([clips[:, 1:], clips[:, :1]], 1).flatten(0, 1)


class _AttendsOverTheBatch(_Base):
    def between(self, x):
        q = x.mean((2, 3))
        return x + (q @ q.T).softmax(-1).mm(q)[:, :, None, None]


class _WindowsFirst(_Base):
    """Windows before samples: as many rows as samples times windows, in the wrong order."""

    def forward(self, x):
        n = len(x)
        x = torch.cat(self.conv(x).chunk(2, -1))
        return self.fc(self.act(x).unflatten(0, (2, n)).mean((0, 3, 4)))


class _SequenceFirst(_Base):
    def forward(self, x):
        tokens = self.conv(x).flatten(2).permute(2, 0, 1)
        return self.fc(self.act(tokens).mean(0))


class _Pools(_Base):
    """One number for the whole batch reaches the activation."""

    def between(self, x):
        return x.mean((0, 2, 3), keepdim=True) + torch.zeros_like(x)


class _ComparesTheBatch(_Base):
    """The activation is well, the output is a matrix of samples and samples."""

    def forward(self, x):
        z = super().forward(x)
        return z @ z.T


WRONG = [_Flips, _Rolls, _Means, _ShiftsSegments, _AttendsOverTheBatch, _WindowsFirst, _SequenceFirst, _Pools,
         _ComparesTheBatch]


@pytest.mark.parametrize('cls', WRONG)
def test_a_wrong_axis_raises_and_changes_nothing(cls):
    model = cls().train()
    state = copy.deepcopy(model.state_dict())
    place = 'the output' if cls is _ComparesTheBatch else 'act'
    for given in (dict(), dict(input_size=(3, 9, 10)), dict(example_inputs=torch.zeros(1, 3, 9, 10))):
        with pytest.raises(ValueError, match=f'axis 0 at {place}.*example_inputs'):
            convert_to_spiking(model, timesteps=T, **given)
        assert type(model) is cls and type(model.act) is nn.GELU and model.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_sequence_first_is_said_so():
    with pytest.raises(ValueError, match='on axis 1, not on axis 0'):
        convert_to_spiking(_SequenceFirst())
    with pytest.raises(ValueError, match="exclude='act'"):
        convert_to_spiking(_SequenceFirst())


@pytest.mark.parametrize('layer', [
    nn.LSTM(6, 8), nn.TransformerEncoderLayer(6, 2, 8, 0., nn.GELU())], ids=['LSTM', 'Transformer'])
def test_sequence_first_layers_of_torch(layer):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.act = layer, nn.ReLU()

        def forward(self, x):
            out = self.layer(x)
            return self.act(out[0] if isinstance(out, tuple) else out)

    with pytest.raises(ValueError, match='axis 0'):
        convert_to_spiking(Net())
    with pytest.raises(ValueError, match='axis 0'):
        convert_to_spiking(Net(), example_inputs=torch.randn(5, 2, 6))


def test_batch_first_layers_of_torch():
    torch.manual_seed(0)
    model = convert_to_spiking(nn.Sequential(
        nn.TransformerEncoderLayer(6, 2, 8, 0., nn.GELU(), batch_first=True), nn.ReLU()), timesteps=T)
    assert sum(isinstance(m, LIF) for m in model.modules()) == 2


class _Conv1d(nn.Module):
    """Takes (B, L) and makes channels itself, of a length that nobody guesses."""

    def __init__(self):
        super().__init__()
        self.conv, self.act, self.fc = nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Linear(4 * 33, 5)

    def forward(self, x):
        left, right = x.chunk(2, -1)
        return self.fc(self.act(self.conv(torch.stack([left, right], 1))).flatten(1))


def test_an_input_that_cannot_be_guessed_is_asked_for():
    model = _Conv1d()
    with pytest.raises(ValueError, match='example_inputs'):
        convert_to_spiking(model)
    assert type(model) is _Conv1d and type(model.act) is nn.ReLU
    x = torch.randn(1, 70)
    steps = convert_to_spiking(model, timesteps=T, example_inputs=x)(x, per_step=True)
    assert steps.shape == (T, 1, 5)
    with pytest.raises(ValueError, match='does not run on an input of shape .71,'):
        convert_to_spiking(_Conv1d(), example_inputs=torch.randn(2, 71))


class _Keywords(_Base):
    def forward(self, pixels, meta, mask=None):
        x = super().forward(pixels) + meta
        return x if mask is None else x * mask


@pytest.mark.parametrize('given', [
    (torch.zeros(2, 3, 9, 9), torch.zeros(2, 5)), [torch.zeros(2, 3, 9, 9), torch.zeros(2, 5)],
    dict(pixels=torch.zeros(1, 3, 9, 9), meta=torch.zeros(1, 5), mask=torch.ones(1, 1, dtype=torch.bool))],
    ids=['tuple', 'list', 'dict'])
def test_example_inputs_of_any_structure(given):
    model = convert_to_spiking(_Keywords(), timesteps=T, example_inputs=given)
    assert isinstance(model.act, LIF)


class _Tokens(nn.Module):
    """Integers cannot be NaN."""

    def __init__(self, first=False):
        super().__init__()
        self.embed, self.fc, self.act = nn.Embedding(11, 6), nn.Linear(6, 6), nn.GELU()
        self.first = first

    def forward(self, tokens):
        x = self.fc(self.embed(tokens))
        return self.act(x.transpose(0, 1)).mean(0) if self.first else self.act(x).mean(1)


def test_integer_inputs():
    convert_to_spiking(_Tokens(), timesteps=T)
    with pytest.raises(ValueError, match='on axis 1'):
        convert_to_spiking(_Tokens(first=True))


class _StopsNan(_Base):
    """A NaN does not pass; other values do."""

    def between(self, x):
        return torch.nan_to_num(x) + (x > 0)


class _RefusesNan(_Base):
    def between(self, x):
        assert torch.isfinite(x).all()
        return x


class _DormantMixing(_Base):
    """A NaN passes to the other samples, values do not."""

    def between(self, x):
        return x + 0 * x.mean(0)


class _Query(_Base):
    """The activation sees the same for every sample, as often as there are samples."""

    def __init__(self):
        super().__init__()
        self.query, self.act2 = nn.Parameter(torch.randn(1, 4)), nn.ReLU()

    def between(self, x):
        return x + self.act2(self.query.expand(len(x), 4))[:, :, None, None]


class _Windows(_Base):
    """Rows are windows of a sample, together."""

    def forward(self, x):
        windows = self.conv(x)[..., :6, :6].unfold(2, 3, 3).unfold(3, 3, 3)
        n, c = windows.shape[:2]
        windows = windows.permute(0, 2, 3, 1, 4, 5).reshape(-1, c, 3, 3)
        return self.fc(self.act(windows).unflatten(0, (n, -1)).mean((1, 3, 4)))


@pytest.mark.parametrize('cls', [_Base, _StopsNan, _RefusesNan, _DormantMixing, _Query, _Windows])
@torch.no_grad()
def test_what_is_in_order_converts_and_keeps_samples_apart(cls):
    torch.manual_seed(0)
    own = cls is _StopsNan  # nonlinear by itself
    model = convert_to_spiking(cls(), timesteps=T, v_threshold=.1, allow_analog=own).eval().double()
    assert own or not [r for r in model.spiking_report() if r.now != 'LIF']
    x = torch.randn(T, 3, 9, 9, dtype=torch.float64)
    # round-off
    assert torch.allclose(model(x), torch.cat([model(x[i:i + 1]) for i in range(T)]), rtol=0, atol=1e-12)


def test_on_meta_the_report_says_pending():
    with torch.device('meta'):
        model = convert_to_spiking(_Conv1d())
    assert [r.now for r in model.spiking_report()] == ['LIF']
    assert 'pending' in model.spiking_report()[0].reason and 'pending' in str(model.spiking_report())
    with torch.device('meta'):
        known = timm.create_model('spiking_test_resnet')
    assert 'pending' not in str(known.spiking_report())
    assert 'pending' not in str(convert_to_spiking(_Base()).spiking_report())


def test_a_foreign_module_inside_of_timms_model_is_looked_at():
    model = timm.create_model('test_resnet')
    model.layer4[0].bn1 = nn.Sequential(model.layer4[0].bn1, _Mixes())
    with pytest.raises(ValueError, match='axis 0 at layer4.0'):
        convert_to_spiking(model)


class _Mixes(nn.Module):
    def forward(self, x):
        return x - x.mean(0, keepdim=True)


class _Volumes(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act, self.head = nn.Conv3d(2, 8, 3), nn.ReLU(), nn.Linear(8, 6)

    def forward(self, x):
        return self.head(self.act(self.conv(x)).mean((-1, -2, -3)))


@pytest.mark.parametrize('given', [{}, {'example_inputs': torch.randn(1, 2, 6, 8, 8)}])
def test_volumes_are_not_taken_for_frames(given):
    """One volume of T channels would run: its channels as frames, and the 8 maps of the convolution as time steps."""
    with pytest.raises(ValueError, match='_Volumes.*event frames'):
        convert_to_spiking(_Volumes(), timesteps=2, **given)
