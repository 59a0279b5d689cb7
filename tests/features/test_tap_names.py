"""Taps by name mean the same in SSCLLoss, in SSCLTask and in the script: stages, modules, 'pooled', in any order."""
import copy
import math

import pytest
import timm
import torch
import torch.nn as nn

from spiking_families import short_resnet
import timm_sscl  # noqa: F401  registers the spiking_ names
from timm_sscl import SSCLLoss, SSCLTask
from timm_sscl.features.reader import FeatureReader
from timm_sscl.distillation.tap_reader import TapReader, create_reader

T = 2
SWIN = dict(img_size=32, patch_size=2, window_size=4, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2),
            drop_path_rate=0.)
MODELS = {
    'test_resnet': dict(zero_init_last=False), 'test_vit': dict(img_size=32), 'test_convnext': {},
    'swin_tiny_patch4_window7_224': SWIN,
}
STAGES = {
    'test_resnet': ['layer2', 'layer4'], 'test_vit': ['blocks.1', 'blocks.5'],
    'test_convnext': ['stages.1', 'stages.3'],
    'swin_tiny_patch4_window7_224': ['layers.1', 'layers.3'],
}


def _models(name='test_resnet'):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kwargs = dict(MODELS[name], num_classes=5)
        student = timm.create_model(f'spiking_{name}', timesteps=T, **kwargs).double().train()
        return student, timm.create_model(name, **kwargs).double()


def _images(n=6, seed=0):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _both_ways(name, taps, teacher_taps=None):
    """The loss by SSCLTask, and by SSCLLoss with the same projections, on one batch; the gradients as well."""
    x, values, grads = _images(), [], []
    student, teacher = _models(name)
    twin = copy.deepcopy(student)
    task = SSCLTask(student, teacher, 'sscl', dict(sscl=dict(cka_floor=1e-3)), taps=taps, teacher_taps=teacher_taps,
                    input_size=(3, 32, 32), verbose=False, dtype=torch.float64).double().train()
    sscl = SSCLLoss(twin, copy.deepcopy(teacher), taps, teacher_taps, input_size=(3, 32, 32), cka_floor=1e-3).double()
    criterion = task.trainable_module.losses['sscl']
    sscl.criterion.load_state_dict(criterion.state_dict())
    value = task(x, torch.arange(6) % 5)['sscl_loss']
    twin(x)
    values = value, sscl(x)
    for loss, model in zip(values, (student, twin)):
        loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    return [v.item() for v in values], grads, (task.stats, sscl.stats)


@pytest.mark.parametrize('name,taps,teacher_taps', [
    *((name, stages, None) for name, stages in STAGES.items()),
    *((name, [stages[0], 'pooled'], None) for name, stages in STAGES.items()),
    ('test_resnet', ['layer4', 'layer1'], ['layer1', 'layer4']),
    ('test_resnet', ['pooled', 'layer3'], ['layer3', 'pooled']),
    ('test_resnet', ['layer3', 'layer3'], ['layer2', 'layer4']),
    ('test_resnet', ['layer1.0.act1', 'layer3', 'pooled'], None),
    ('test_resnet', ['layer4', 'layer2.0.bn2', 'layer1'], ['layer1', 'layer2.0.bn2', 'layer4']),
    ('test_vit', ['blocks.0.mlp', 'blocks.5.norm1'], None),
    ('swin_tiny_patch4_window7_224', ['layers.1.blocks.0', 'layers.2.downsample'], None),
], ids=str)
def test_names_mean_the_same_in_loss_and_task(name, taps, teacher_taps):
    (task, loss), grads, stats = _both_ways(name, taps, teacher_taps)
    # the same tensors, read in two ways; sums of other strides
    assert task == pytest.approx(loss, rel=1e-9)
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 4
    for key, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][key], rtol=1e-7, atol=1e-11)
    assert list(stats[0]) == list(stats[1]) and len(stats[0]) == len(taps)


def test_order_of_names_pairs_them():
    straight = _both_ways('test_resnet', ['layer1', 'layer4'], ['layer4', 'layer1'])
    swapped = _both_ways('test_resnet', ['layer4', 'layer1'], ['layer1', 'layer4'])
    other = _both_ways('test_resnet', ['layer1', 'layer4'], ['layer1', 'layer4'])
    assert {k: v['cka'] for k, v in straight[2][0].items()} == pytest.approx(
        {k: v['cka'] for k, v in swapped[2][0].items()}, rel=1e-6)
    assert abs(other[2][0]['layer1']['cka'] - straight[2][0]['layer1']['cka']) > 1e-3


def test_channels_of_a_stage_with_channels_last():
    student, teacher = _models('swin_tiny_patch4_window7_224')
    sscl = SSCLLoss(student, teacher, ['layers.1', 'layers.2'], input_size=(3, 32, 32))
    assert [tap.channels for tap in sscl.taps] == [16, 32] == [
        entry['num_chs'] for entry in student.feature_info[1:3]]


def test_a_stage_of_a_vit_has_no_class_token():
    student, _ = _models('test_vit')
    for reader in (create_reader(student, ['blocks.3']), TapReader(student, ['blocks.3', 'blocks.0.mlp'])):
        assert reader.shapes[0][:2] == (T, 64) and math.prod(reader.shapes[0][2:]) == 4  # 2 x 2 patches of 16


def test_which_reader_is_used():
    student, _ = _models()
    assert isinstance(create_reader(student, 4), FeatureReader)
    assert isinstance(create_reader(student, ['layer1', 'pooled']), FeatureReader)
    assert isinstance(create_reader(student, ['layer1', 'layer2.0']), TapReader)
    with pytest.raises(ValueError, match="'layer9'.*layer1"):
        create_reader(student, ['layer9'])
    with pytest.raises(ValueError, match='at least one'):
        create_reader(student, [])


def test_module_taps_leave_the_rest_alone():
    student, teacher = _models()
    task = SSCLTask(student, teacher, 'sscl', taps=['layer1.0.act1'], verbose=False, dtype=torch.float64).double()
    x, y = _images(), torch.arange(6) % 5
    first = task.train()(x, y)['loss'].item()
    student(x)  # a forward of the user's own
    with torch.no_grad():
        task.student.eval()(x)
        task.teacher(x)
    task.eval()
    assert not task.trainable_module.reader.recorder.records
    fresh = SSCLTask(*_models(), 'sscl', taps=['layer1.0.act1'], verbose=False, dtype=torch.float64).double().train()
    fresh.trainable_module.losses.load_state_dict(task.trainable_module.losses.state_dict())
    assert fresh(x, y)['loss'].item() == pytest.approx(first, rel=1e-9)


@pytest.mark.parametrize('how', ['checkpointed', 'compiled', 'averaged'])
def test_module_taps_in_training(how):
    student, teacher = _models()
    if how == 'compiled':
        student, teacher = short_resnet(timesteps=T), short_resnet()
    student.set_grad_checkpointing(how == 'checkpointed')
    task = SSCLTask(student, teacher, 'sscl', taps=['layer1.0.act1', 'layer3.0.bn3', 'pooled'], verbose=False,
                    dtype=torch.float64).double().train()
    plain = copy.deepcopy(task)
    plain.student.set_grad_checkpointing(False)
    if how == 'compiled':
        task.compile(backend='eager')  # dynamo's part, where hooks could break
    if how == 'averaged':
        task.setup_ema(decay=0.5)
    for step in range(2):
        batch = _images(seed=step), torch.arange(6) % 5
        losses = [t(*batch)['loss'] for t in (task, plain)]
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-9)
        for t, loss in zip((task, plain), losses):
            t.zero_grad()
            loss.backward()
        for p, q in zip(task.student.parameters(), plain.student.parameters()):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-11)  # sums in another order


def test_rows_that_are_no_samples_raise():
    student, teacher = _models('swin_tiny_patch4_window7_224')
    with pytest.raises(ValueError, match='attn.*rows'):
        task = SSCLTask(student, teacher, 'sscl', taps=['layers.0.blocks.0.attn'], input_size=(3, 32, 32),
                        verbose=False, dtype=torch.float64).double().train()
        task(_images(), torch.arange(6) % 5)


class _Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 2)
        self.act = nn.ReLU()
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.act(self.stem(x)).mean((2, 3)))


def test_a_model_without_stages_asks_for_names():
    with pytest.raises(ValueError, match='--sscl-taps.*stem, act, head'):
        SSCLTask(_Plain(), _Plain(), 'sscl', verbose=False)
    task = SSCLTask(_Plain(), _Plain(), 'sscl', taps=['stem', 'act'], verbose=False).train()
    result = task(_images().float(), torch.arange(6) % 5)
    result['loss'].backward()
    assert list(task.stats) == ['stem', 'act'] and task.student.stem.weight.grad.abs().sum() > 0


def test_numbers_and_names_do_not_mix():
    for taps, teacher_taps in ((4, ['layer1']), (['layer1'], 4)):
        with pytest.raises(ValueError, match='numbers of stages, or names'):
            SSCLTask(*_models(), 'sscl', taps=taps, teacher_taps=teacher_taps, verbose=False)
