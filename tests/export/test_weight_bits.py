"""Weights of 16 and 24 bits in a deployed model: int8 planes, whose sum is the weight."""
import copy
import io
import itertools

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_sscl import convert_to_spiking
from timm_sscl.cpu_features import int8_instructions
from timm_sscl.export import deploy, int8_missing
from timm_sscl.export.int8 import Geometry, join_planes, split_weight
from timm_sscl.export.layers import Int8Conv2d, Int8Linear
from timm_sscl.export.levels import Levels

needs_int8 = pytest.mark.skipif(int8_missing() is not None, reason=f'no int8 kernels: {int8_missing()}')


@pytest.fixture(params=['AMX', 'VNNI', ''], ids=lambda name: name or 'none')
def instructions(request, monkeypatch):
    """Choose as a CPU with these instructions does; the kernels are this machine's."""
    monkeypatch.setattr('timm_sscl.export.int8.int8_instructions', lambda: request.param)
    return request.param


@pytest.mark.parametrize('planes', [1, 2, 3])
def test_planes_add_up_to_the_weight(planes):
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    levels, scale = split_weight(weight, planes)
    assert levels.shape == (planes, *weight.shape) and levels.dtype == torch.int8
    by_hand = sum(plane.double() / 254 ** i for i, plane in enumerate(levels)) * scale.double().view(-1, 1, 1, 1)
    last = scale.double() / 254 ** (planes - 1)  # a level of the last plane
    assert ((by_hand - weight).abs().amax((1, 2, 3)) <= last / 2).all()
    assert ((by_hand - weight).abs().amax((1, 2, 3)) > last / 8).all()  # of 45 weights, some lie between levels
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(join_planes(levels, scale).double(), by_hand, rtol=eps, atol=0)


def test_no_plane_without_need():
    whole = torch.tensor([[127., -3.], [64., 127.]]) / 32
    levels, scale = split_weight(whole, 3)
    assert len(levels) == 1 and torch.equal(join_planes(levels, scale), whole)
    assert len(split_weight(torch.zeros(2, 3), 3)[0]) == 1


@needs_int8
@torch.no_grad()
@pytest.mark.parametrize('planes', [2, 3])
def test_layers_against_float64(planes, instructions):
    generator = torch.Generator().manual_seed(0)
    for levels, groups, size in itertools.product((Levels(0, 1), Levels(-1, 1), Levels(0, 4, 4)), (1, 4), (3, 9)):
        weight, bias = torch.randn(8, 32 // groups, 3, 2, generator=generator), torch.randn(8, generator=generator)
        geometry = Geometry((2, 1), (1, 0), (1, 2), groups)
        layer = Int8Conv2d(weight, bias, levels, geometry, planes).eval()
        whole = torch.randint(levels.low, levels.high + 1, (3, 32, size, size), generator=generator)
        expected = F.conv2d(whole.double() / levels.parts, weight.double(), bias.double(), *geometry)
        # rounded weights: half a level of the last plane for every spike; float32: its sums of 192 products
        spikes = F.conv2d(whole.double().abs() / levels.parts, torch.ones(8, 32 // groups, 3, 2).double(), None,
                          *geometry)
        last = layer.weight_scale.double().view(-1, 1, 1) / 254 ** (planes - 1)
        bound = spikes * last / 2 + 16 * torch.finfo(torch.float32).eps * weight.abs().max() * (spikes + 1)
        for x in (whole.to(levels.dtype), whole / levels.parts):
            out = layer(x.contiguous(memory_format=torch.channels_last))
            assert ((out.double() - expected).abs() <= bound).all(), (levels, groups, size)
            assert out.is_contiguous(memory_format=torch.channels_last)
    tokens = torch.randint(0, 2, (5, 7, 300), generator=generator)
    weight = torch.randn(9, 300, generator=generator)
    out = Int8Linear(weight, None, Levels(0, 1), planes).eval()(tokens.to(torch.uint8))
    bound = 300 * (weight.abs().amax(1).double() / 127 / 254 ** (planes - 1) / 2
                   + 16 * torch.finfo(torch.float32).eps * weight.abs().max())
    assert ((out.double() - F.linear(tokens.double(), weight.double())).abs() <= bound).all()


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.act1 = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()
        self.conv2, self.act2, self.pool = nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        self.conv3, self.act3, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Linear(16, 5)

    def forward(self, x):
        x = self.pool(self.act2(self.conv2(self.act1(self.conv1(x)))))
        return self.head(self.act3(self.conv3(x)).mean((2, 3)))


@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    model = convert_to_spiking(_Net(), timesteps=4, v_threshold=.1).eval()
    return model, torch.randn(16, 3, 8, 8)


@needs_int8
@torch.no_grad()
def test_24_bits_keep_the_spikes_that_8_bits_flip(net, instructions):
    model, images = net
    expected = model(images, per_step=True)
    outs = {bits: deploy(model, images[:1], weight_bits=bits)(images, per_step=True) for bits in (8, 16, 24)}
    wrong = {bits: (out - expected).abs().amax((0, 2)) > 1e-5 for bits, out in outs.items()}  # per image
    # 82,000 potentials, 5,000 per image; about one in 10 million is within the rounding of 24 bits of its threshold
    assert not wrong[24].any() and wrong[8].sum() >= 8 >= wrong[16].sum()
    assert torch.equal(deploy(model, images[:1])(images, per_step=True), outs[24])  # the default


@needs_int8
@torch.no_grad()
def test_report_and_state(net, instructions):
    model, images = net
    deployed = deploy(model, images[:1])
    report = deployed.deploy_report
    assert set(report.int8) == {'conv2', 'conv3'}
    assert all(text.startswith('24 bits, input ') for text in report.int8.values())
    assert report.faster_in_float32 == (() if instructions == 'AMX' else ('conv2', 'conv3'))
    assert ('in float32 on this CPU' in str(report)) == bool(report.faster_in_float32) and '(24 bits)' in str(report)
    state = deployed.state_dict()
    assert state['conv2.weight_rest'].shape == (2, 16, 16, 3, 3) and state['conv2.weight_rest'].dtype == torch.int8
    expected, file = deployed(images), io.BytesIO()
    torch.save(deployed, file)
    file.seek(0)
    for again in (copy.deepcopy(deployed), torch.load(file, weights_only=False)):
        assert torch.equal(again(images), expected)


@needs_int8
@torch.no_grad()
def test_exported_program_is_as_precise(net):
    model, images = net
    program = torch.export.export(deploy(model, images[:1]), (images,))
    torch.testing.assert_close(program.module()(images), model(images))  # in float32 there
    assert program.state_dict['conv2.weight_rest'].dtype == torch.int8


@needs_int8
@torch.no_grad()
def test_state_brings_its_bits(net):
    """Whatever the model had that it is loaded into: a layer of zeros has one plane, an older file has 8 bits."""
    model, images = net
    empty = copy.deepcopy(model)
    empty.conv3.weight.zero_()
    for bits in (8, 24):
        deployed = deploy(model, images[:1], weight_bits=bits)
        other = deploy(empty, images[:1], weight_bits=32 - bits)
        other(images)
        other.load_state_dict(deployed.state_dict())
        assert torch.equal(other(images), deployed(images))


@needs_int8
@torch.no_grad()
def test_file_from_before_there_were_planes(net):
    model, images = net
    deployed = deploy(model, images[:1], weight_bits=8)
    expected = deployed(images)
    report = deployed.deploy_report
    del report.__dict__['weight_bits'], report.__dict__['faster_in_float32']
    for name in ('conv2', 'conv3'):
        state = deployed.get_submodule(name).__getstate__()
        del state['_buffers']['weight_rest'], state['_float_weight']
        layer = Int8Conv2d.__new__(Int8Conv2d)
        layer.__setstate__(state)  # as torch.load does it
        setattr(deployed, name, layer)
    assert torch.equal(deployed(images), expected)
    assert '8 bits' in repr(deployed.conv2) and '(8 bits)' in str(deployed.deploy_report)


@pytest.mark.parametrize('bits', [32, 0, '8'])
def test_other_bits_are_refused(net, bits):
    with pytest.raises(ValueError, match=f'weight_bits={bits!r}.*8, 16 or 24'):
        deploy(*net, weight_bits=bits)


@pytest.mark.parametrize('flags, limit, expected', [
    ('avx512_vnni amx_int8', None, 'AMX'), ('avx512_vnni amx_int8', 'AVX512_CORE_VNNI', 'VNNI'),
    ('avx2 avx_vnni', 'ALL', 'VNNI'), ('avx512_vnni amx_int8', 'AVX2', ''), ('avx2', None, ''), (None, None, '')])
def test_instructions_for_int8(tmp_path, monkeypatch, flags, limit, expected):
    monkeypatch.delenv('ONEDNN_MAX_CPU_ISA', raising=False)
    if limit is not None:
        monkeypatch.setenv('ONEDNN_MAX_CPU_ISA', limit)
    if flags is not None:
        (tmp_path / 'cpuinfo').write_text(f'processor : 0\nflags : fpu {flags}\n')
    assert int8_instructions.__wrapped__(tmp_path / 'cpuinfo') == expected
