"""SSCLTask: what is trained and on what loss, its checkpoint, and two processes against one."""
import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.utils import unwrap_model
from torch.nn.parallel import DistributedDataParallel as DDP

from processes import run_processes
from spiking_families import short_resnet
import timm_sscl  # noqa: F401  registers the spiking_ names
from timm_sscl import SSCLLoss, SSCLTask
from timm_sscl.distributed import gather_rows
from timm_sscl.losses import kd_loss

T = 2


def _model(name, seed=0, **kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if name.startswith('spiking_'):
            kwargs.setdefault('timesteps', T)
        if name.endswith('test_resnet'):
            kwargs.setdefault('zero_init_last', False)
        return timm.create_model(name, num_classes=5, **kwargs)


def _task(losses='sscl', name='test_resnet', teacher=True, seed=0, student_kwargs=None, model_kwargs=None, **kwargs):
    student = _model(f'spiking_{name}', seed, **(student_kwargs or {}), **(model_kwargs or {}))
    teacher = _model(name, seed + 1, **(model_kwargs or {})) if teacher else None
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # for the projections
        return SSCLTask(student, teacher, losses, verbose=False, **kwargs)


def _batch(n=6, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 32, 32, generator=generator, dtype=torch.float64).to(dtype), torch.arange(n) % 5


def _steps(task, steps=3, seed=0, lr=0.1):
    """SGD steps from a seed; the losses."""
    task.train()
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=lr, momentum=0.9)
    torch.manual_seed(seed)
    losses = []
    for step in range(steps):
        result = task(*_batch(seed=step))
        optimizer.zero_grad()
        result['loss'].backward()
        optimizer.step()
        losses.append(result['loss'].item())
    return losses


def _same_parameters(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))


# ---- the loss

@pytest.mark.parametrize('losses,terms', [
    ('sscl', {'sscl': 1.}), ('contrastive', {'contrastive': 1.}), ('kd', {'kd': 1.}), ('none', {}),
    ({'sscl': 0.3, 'kd': 2.}, {'sscl': 0.3, 'kd': 2.}), ({}, {}), ({'kd': 0.5, 'sscl': 0}, {'kd': 0.5}),
], ids=str)
def test_loss_is_the_weighted_sum(losses, terms):
    task = _task(losses, task_loss_weight=0.7).train()
    x, y = _batch()
    result = task(x, y)
    assert set(result) == {'loss', 'output', 'task_loss', *(f'{name}_loss' for name in terms)}
    assert result['output'].shape == (6, 5)
    assert result['task_loss'].item() == F.cross_entropy(result['output'], y).item()
    expected = 0.7 * result['task_loss'].item() + sum(w * result[f'{name}_loss'].item() for name, w in terms.items())
    assert result['loss'].item() == pytest.approx(expected, rel=1e-6)  # one float32 sum in another order
    result['loss'].backward()
    assert all(p.grad is not None for p in task.student.parameters())


def test_output_is_the_students_and_the_terms_are_the_losses_of_its_features():
    task = _task({'sscl': 1., 'contrastive': 1., 'kd': 1.}).train()
    x, y = _batch()
    student, teacher = copy.deepcopy(task.student), task.teacher
    result = task(x, y)
    sscl = SSCLLoss(student, teacher)  # the other way to the same features: hooks
    uniform = SSCLLoss(student, teacher, weighting='uniform')
    output = student.train()(x)
    with torch.no_grad():
        teacher_output = teacher(x)
    # projections start alike only by their state
    for loss, name in ((sscl, 'sscl'), (uniform, 'contrastive')):
        own = unwrap_model(task.trainable_module).losses[name]
        loss.criterion.load_state_dict({k: v for k, v in own.state_dict().items() if k.startswith('g_')}, strict=False)
        # the same tensors, read in two ways; float32 sums of other strides
        assert loss(x).item() == pytest.approx(result[f'{name}_loss'].item(), rel=1e-5)
    assert torch.equal(result['output'], output)
    assert result['kd_loss'].item() == kd_loss(output, teacher_output).item()


def test_contrastive_is_sscl_with_uniform_weights():
    task = _task('contrastive').train()
    task(*_batch())
    assert len(task.stats) == 5 and all(values['weight'] == 1 for values in task.stats.values())
    weighted = _task('sscl').train()
    result = weighted(*_batch())
    assert any(values['weight'] != 1 for values in weighted.stats.values())
    assert result['sscl_loss'].item() == pytest.approx(
        sum(v['weight'] * v['nce'] for v in weighted.stats.values()), rel=1e-5)


@pytest.mark.parametrize('name', ['sscl', 'kd'])
def test_weight_zero_is_exactly_the_mode_without(name):
    dropout = dict(drop_rate=0.3, drop_path_rate=0.3)
    tasks = [_task(losses, teacher=teacher, student_kwargs=dropout)
             for losses, teacher in (({name: 0.}, True), ('none', False), ('none', True))]
    losses = [_steps(task) for task in tasks]
    plain = _model('spiking_test_resnet', **dropout).train()  # and the loop that everybody writes
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(0)
    for step in range(3):
        x, y = _batch(seed=step)
        loss = F.cross_entropy(plain(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] == losses[1] == losses[2] and losses[0][-1] == loss.item()
    assert all(_same_parameters(task.student, plain) for task in tasks)
    weighted = _task({name: 1.}, student_kwargs=dropout)
    _steps(weighted)
    assert not _same_parameters(weighted.student, plain)


def test_same_seed_gives_the_same_run_and_building_a_task_draws_no_numbers():
    rng = torch.get_rng_state()
    student, teacher = _model('spiking_test_resnet'), _model('test_resnet', 1)
    assert torch.equal(torch.get_rng_state(), rng)
    SSCLTask(student, teacher, verbose=False)
    assert torch.equal(torch.get_rng_state(), rng)
    assert _steps(_task()) == _steps(_task())


# ---- the teacher

def test_teacher_is_frozen_and_stays_in_evaluation_mode():
    task = _task().train()
    assert task.student.training and not any(m.training for m in task.teacher.modules())
    before = copy.deepcopy(task.teacher.state_dict())
    _steps(task)
    assert all(not p.requires_grad and p.grad is None for p in task.teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in task.teacher.state_dict().items())
    assert not {id(p) for p in task.teacher.parameters()} & {id(p) for p in task.trainable_module.parameters()}
    task.eval()
    assert not task.student.training
    assert task.train() is task


def test_teacher_is_not_run_where_nothing_needs_it():
    student, teacher = _model('spiking_test_resnet'), _model('test_resnet', 1)
    calls = []
    teacher.register_forward_hook(lambda *args: calls.append(1))
    task = SSCLTask(student, teacher, 'none', verbose=False).train()
    task(*_batch())
    assert not calls and task.teacher is None
    SSCLTask(student, None, 'none', verbose=False).train()(*_batch())
    SSCLTask(student, teacher, 'kd', verbose=False).train()(*_batch())
    assert len(calls) == 1  # once, not once per time step


def test_teacher_that_is_missing_raises():
    for losses in ('sscl', 'contrastive', 'kd'):
        with pytest.raises(ValueError, match=f'{losses}.*teacher is None'):
            _task(losses, teacher=False)


def test_student_as_its_own_teacher_raises():
    student = _model('spiking_test_resnet')
    with pytest.raises(ValueError, match='same'):
        SSCLTask(student, student, verbose=False)
    assert all(p.requires_grad for p in student.parameters())  # it was not frozen


@pytest.mark.parametrize('losses,match', [('scl', "unknown preset 'scl'"), ({'skd': 1.}, "unknown loss 'skd'.*'kd'"),
                                          ({'kd': -1.}, 'weight.*-1'), ({'kd': math.nan}, 'weight.*nan')], ids=str)
def test_losses_that_do_not_exist_raise(losses, match):
    with pytest.raises(ValueError, match=match):
        _task(losses)


def test_renormalize_gives_the_teacher_its_own_statistics():
    student_stats, teacher_stats = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    pixels = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    x, for_teacher = ((pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
                      for mean, std in (student_stats, teacher_stats))
    task = _task('kd', renormalize=(*student_stats, *teacher_stats)).train()
    seen = []
    task.teacher.conv1.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    task.student.conv1.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    task(x, _batch()[1])
    by_batch = {len(s): s for s in seen}
    torch.testing.assert_close(by_batch[6], for_teacher, rtol=0, atol=1e-5)  # float32, values up to 3
    assert torch.equal(by_batch[6 * T], torch.cat([x] * T))
    same = _task('kd', renormalize=(*student_stats, *student_stats)).train()
    plain = _task('kd').train()
    assert same(x, _batch()[1])['kd_loss'].item() == plain(x, _batch()[1])['kd_loss'].item()


def test_event_frames_and_a_spiking_teacher():
    task = SSCLTask(
        _model('spiking_test_resnet'), _model('spiking_test_resnet', 1), {'sscl': 1., 'kd': 1.}, verbose=False,
        renormalize=([0.] * 3, [1.] * 3, [0.5] * 3, [0.5] * 3)).train()
    frames = torch.stack([_batch(seed=0)[0], _batch(seed=1)[0]], 1)
    seen = []
    task.teacher.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    task.teacher.conv1.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    result = task(frames, _batch()[1])
    assert torch.isfinite(result['loss'])
    torch.testing.assert_close(seen[-1], (frames.transpose(0, 1).flatten(0, 1) - 0.5) / 0.5)


# ---- taps

def test_taps_by_number_and_by_name():
    def layers(**kwargs):
        task = _task(**kwargs).train()
        task(*_batch())
        return list(task.stats)

    assert layers() == ['layer1', 'layer2', 'layer3', 'layer4', 'pooled']
    assert layers(taps=1) == ['layer4', 'pooled']
    assert layers(taps=['layer1', 'layer3']) == ['layer1', 'layer3']
    assert layers(taps=['layer1', 'layer3'], teacher_taps=['layer2', 'layer4']) == ['layer1', 'layer3']
    assert layers(taps=['pooled']) == ['pooled']
    with pytest.raises(ValueError, match='pairs'):
        layers(taps=['layer1', 'layer3'], teacher_taps=['layer2'])
    with pytest.raises(ValueError, match="'layer9'"):
        layers(taps=['layer9'])


def test_named_taps_pair_with_the_teachers_named_ones():
    task = _task('contrastive', taps=['layer1', 'layer3'], teacher_taps=['layer3', 'layer4'])
    criterion = task.trainable_module.losses['contrastive']
    assert [g.in_features for g in criterion.g_student] == [32, 192]
    assert [g.in_features for g in criterion.g_teacher] == [192, 96]


def test_models_of_different_architecture():
    student = _model('spiking_test_resnet')
    teacher = _model('test_vit', 1, img_size=32, depth=2)
    task = SSCLTask(student, teacher, verbose=False).train()
    result = task(*_batch())
    result['loss'].backward()
    assert list(task.stats) == ['layer2', 'layer4', 'pooled'] and torch.isfinite(result['loss'])


# ---- seams to timm's training

def test_checkpoint_state():
    task = _task()
    _steps(task)
    state = task.get_checkpoint_state()
    assert set(state) == {'state_dict', 'task_state'}
    assert set(state['state_dict']) == set(task.student.state_dict())  # as the plain model names them
    assert set(state['task_state']) == {'losses'}
    names = state['task_state']['losses']
    assert sum('g_student' in n for n in names) == sum('g_teacher' in n for n in names) == 10
    assert sum('running_cka' in n for n in names) == 10
    fresh = _model('spiking_test_resnet', seed=5)
    fresh.load_state_dict(state['state_dict'])  # loads into the model without the task
    x, _ = _batch()
    assert torch.equal(fresh.eval()(x), task.student.eval()(x))
    assert set(_task('none').get_checkpoint_state()) == {'state_dict'}


def test_checkpoint_round_trip():
    task = _task({'sscl': 1., 'contrastive': 0.5})
    _steps(task)
    state = copy.deepcopy(task.get_checkpoint_state())
    resumed = _task({'sscl': 1., 'contrastive': 0.5}, seed=3)
    resumed.teacher.load_state_dict(task.teacher.state_dict())
    with torch.no_grad():
        for p in unwrap_model(resumed.trainable_module).losses.parameters():
            p.normal_()
    resumed.load_checkpoint_state(state['state_dict'], state['task_state'])
    results = []
    for t in (task, resumed):
        t.zero_grad()
        result = t.train()(*_batch(seed=9))
        result['loss'].backward()
        results.append((result['loss'].item(), t.stats, [p.grad for p in t.trainable_module.parameters()]))
    assert results[0][:2] == results[1][:2]  # the running CKA goes on where it was
    assert all(torch.equal(a, b) for a, b in zip(results[0][2], results[1][2]))
    broken = {'losses': {k: v for k, v in state['task_state']['losses'].items() if 'g_student' not in k}}
    with pytest.raises(RuntimeError, match='g_student'):
        resumed.load_checkpoint_state(state['state_dict'], broken)
    resumed.load_checkpoint_state(state['state_dict'], broken, strict=False)
    resumed.load_checkpoint_state(state['state_dict'], None)  # a checkpoint without a task: a baseline's, say


def test_ema():
    task = _task().train()
    task.setup_ema(decay=0.75)
    start = {k: v.clone() for k, v in task.trainable_module.state_dict().items()}
    _steps(task, 1)
    task.update_ema()
    student = task.get_eval_model(ema=True)
    assert student is not task.student and type(student) is type(task.student)
    state = task.get_checkpoint_state(ema=True)
    assert set(state) == {'state_dict_ema', 'task_state_ema'}
    now = task.trainable_module.state_dict()
    averaged = {**{f'student.{k}': v for k, v in state['state_dict_ema'].items()},
                **{f'losses.{k}': v for k, v in state['task_state_ema']['losses'].items()}}
    assert set(averaged) == set(now)
    moved = 0
    for k, v in averaged.items():
        if v.is_floating_point():
            torch.testing.assert_close(v, 0.75 * start[k] + 0.25 * now[k], rtol=1e-5, atol=1e-6)
            moved += not torch.equal(v, now[k])
    assert moved > 40
    _steps(task, 1)  # the average does not take part in training
    assert all(torch.equal(v, averaged[f'student.{k}'])
               for k, v in task.get_checkpoint_state(ema=True)['state_dict_ema'].items())
    other = _task(seed=4)
    with pytest.raises(RuntimeError, match='EMA'):
        other.load_checkpoint_state(state['state_dict_ema'], state['task_state_ema'], ema=True)
    other.setup_ema()
    other.load_checkpoint_state(state['state_dict_ema'], state['task_state_ema'], ema=True)
    assert all(torch.equal(v, averaged[f'student.{k}']) for k, v in other.get_eval_model(ema=True).state_dict().items())


def test_eval_model_is_the_plain_student():
    task = _task()
    assert task.get_eval_model() is task.student is unwrap_model(task.trainable_module).student
    assert task.get_eval_model()(_batch()[0]).shape == (6, 5)
    assert task.get_eval_model(ema=True) is None


def test_clip_parameters():
    task = _task()
    projections = {id(p) for p in task.trainable_module.losses.parameters()}
    clipped = {id(p) for p in task.get_clip_parameters()}
    assert clipped == {id(p) for p in task.trainable_module.parameters()} and projections <= clipped
    without_head = {id(p) for p in task.get_clip_parameters(exclude_head=True)}
    head = {id(task.student.fc.weight), id(task.student.fc.bias)}
    assert without_head == clipped - head


def test_optimizer_by_timm_trains_the_projections():
    task = _task().train()
    optimizer = create_optimizer_v2(task.trainable_module, 'sgd', lr=.1, weight_decay=1e-4)
    members = {id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']}
    assert set(members) == {id(p) for p in task.trainable_module.parameters()}
    before = copy.deepcopy(task.trainable_module.losses.state_dict())
    for name, p in task.trainable_module.losses.named_parameters():
        assert members[id(p)] == (0. if name.endswith('bias') else 1e-4)
    task(*_batch())['loss'].backward()
    optimizer.step()
    weights = [(k, v) for k, v in task.trainable_module.losses.named_parameters() if k.endswith('weight')]
    assert len(weights) == 10 and all(not torch.equal(v, before[k]) for k, v in weights)


def test_weight_decay_exceptions_and_layer_decay_of_a_vit():
    task = _task(name='test_vit', model_kwargs=dict(img_size=32))
    module = task.trainable_module
    exceptions = task.student.no_weight_decay()
    assert 'pos_embed' in exceptions
    assert {name.removeprefix('student.') for name in module.no_weight_decay()} == set(exceptions)
    optimizer = create_optimizer_v2(module, 'adamw', lr=0.1, weight_decay=0.05, layer_decay=0.5)
    settings = {id(p): (group.get('lr_scale', 1.), group['weight_decay'])
                for group in optimizer.param_groups for p in group['params']}
    own = create_optimizer_v2(task.student, 'adamw', lr=0.1, weight_decay=0.05, layer_decay=0.5)
    expected = {id(p): (group.get('lr_scale', 1.), group['weight_decay'])
                for group in own.param_groups for p in group['params']}
    assert set(settings) == {id(p) for p in module.parameters()}
    for name, p in module.student.named_parameters():
        assert settings[id(p)] == expected[id(p)], name  # as for the student alone
    assert settings[id(module.student.pos_embed)][1] == 0
    scales = [settings[id(module.student.blocks[i].attn.qkv.weight)][0] for i in range(6)]
    assert all(a < b for a, b in zip(scales, scales[1:]))
    for name, p in module.losses.named_parameters():
        assert settings[id(p)] == (1., 0. if name.endswith('bias') else 0.05)


def test_to_dtype_takes_everything_along():
    task = _task().double().train()
    assert {p.dtype for p in task.parameters()} == {torch.float64}
    result = task(*_batch(dtype=torch.float64))
    assert result['loss'].dtype == torch.float64


@pytest.mark.parametrize('name,model_kwargs', [
    ('test_resnet', dict(layers=(2, 1, 1, 2))), ('test_vit', dict(img_size=32))])
def test_gradient_checkpointing(name, model_kwargs):
    results = []
    for checkpointing in (False, True):
        task = _task(name=name, model_kwargs=model_kwargs).double().train()
        task.student.set_grad_checkpointing(checkpointing)
        result = task(*_batch(dtype=torch.float64))
        result['loss'].backward()
        results.append((result['loss'].item(), [p.grad for p in task.trainable_module.parameters()]))
    assert results[0][0] == results[1][0]
    for p, q in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)  # the same terms, added in another order


def test_soft_targets():
    task = _task(criterion_kwargs=dict(soft_targets=True)).train()
    x, y = _batch()
    mixed, targets = Mixup(mixup_alpha=1., label_smoothing=0.1, num_classes=5)(x.clone(), y)
    assert targets.shape == (6, 5)
    result = task(mixed, targets)
    expected = -(targets * F.log_softmax(result['output'], 1)).sum(1).mean()
    assert result['task_loss'].item() == pytest.approx(expected.item(), rel=1e-5)
    result['loss'].backward()
    assert task.student.layer1[0].conv1.weight.grad.abs().sum() > 0


def test_criterion_of_ones_own():
    task = _task('none', criterion=lambda output, target: output.sum() * 0 + 3.).train()
    assert task(*_batch())['loss'].item() == 3
    smoothed = _task('none', criterion_kwargs=dict(smoothing=0.2)).train()
    x, y = _batch()
    result = smoothed(x, y)
    assert result['loss'].item() == pytest.approx(
        F.cross_entropy(result['output'], y, label_smoothing=0.2).item(), rel=1e-5)


def test_small_batch_says_what_to_do():
    task = _task().train()
    with pytest.raises(ValueError, match='batch of 3.*at least 4'):
        task(*_batch(3))
    assert torch.isfinite(_task('contrastive').train()(*_batch(2))['loss'])


def test_training_lowers_the_loss():
    task = _task({'contrastive': 0.1}, name='test_efficientnet').train()
    optimizer = torch.optim.AdamW(task.trainable_module.parameters(), lr=0.01)
    losses = []
    for _ in range(8):
        result = task(*_batch(10))
        optimizer.zero_grad()
        result['loss'].backward()
        optimizer.step()
        losses.append(result['loss'].item())
    assert losses[-1] < 0.9 * losses[0]


# ---- two processes

# a network without BatchNorm, so that what a sample gives does not depend on the rest of its batch
DISTRIBUTED_MODEL = 'test_efficientnet_gn'
# the last is small enough for one process to leave the CKA statistic out
DISTRIBUTED_BATCHES = [[4, 4], [5, 4], [4, 3]]


def _contrastive_task():
    # classification in the graph, for DistributedDataParallel's sake, but at weight 0: its mean is the processes' own
    return _task('contrastive', DISTRIBUTED_MODEL, task_loss_weight=0.).double().train()


def _contrastive_loop():
    student, teacher = _model(f'spiking_{DISTRIBUTED_MODEL}').double().train(), _model(DISTRIBUTED_MODEL, 1).double()
    torch.manual_seed(0)  # for the projections
    return student, SSCLLoss(student, teacher, weighting='uniform').double()


def _cat_gradients(*modules):
    return torch.cat([p.grad.flatten() for m in modules for p in m.parameters()])


def _worker(rank):
    """One of two processes: gradients of the contrastive term for every split, by the task and by the loop."""
    results = {}
    for sizes in DISTRIBUTED_BATCHES:
        x, y = _batch(sum(sizes), dtype=torch.float64)
        x, y = x.split(sizes)[rank], y.split(sizes)[rank]
        entry = {}
        try:
            task = _contrastive_task()
            task.prepare_distributed()
            result = task(x, y)
            result['loss'].backward()
            entry['task'] = result['contrastive_loss'].item(), _cat_gradients(task.trainable_module)
            if sizes == [5, 4]:
                student, sscl = _contrastive_loop()
                student, sscl = DDP(student), DDP(sscl)
                loss = 0 * student(x).sum() + sscl(x)
                loss.backward()
                entry['loop'] = loss.item(), _cat_gradients(student, sscl)
                rows = (torch.arange(4. * sizes[rank]).view(-1, 4) + 100 * rank).requires_grad_()
                gathered = gather_rows(rows)
                (gathered * torch.arange(9.).view(9, 1) * (rank + 1)).sum().backward()
                entry['gather'] = gathered.detach(), rows.grad
        except Exception as error:  # reported in the parent, by the split it belongs to
            entry['error'] = repr(error)
        results[tuple(sizes)] = entry
        if 'error' in entry:
            break  # the processes are out of step
    return results


@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
    return run_processes(_worker, 2, tmp_path_factory.mktemp('two_processes'))


# float64; the processes' gradients are summed in another order, and features of 8 images are not those of 4 to the
# last bit
ROUND_OFF = dict(rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize('sizes', DISTRIBUTED_BATCHES, ids=str)
def test_two_processes_equal_one_on_the_whole_batch(two_processes, sizes):
    task = _contrastive_task()
    result = task(*_batch(sum(sizes), dtype=torch.float64))
    result['loss'].backward()
    expected = _cat_gradients(task.trainable_module)
    assert expected.abs().max() > 1e-3
    for of_rank in two_processes:
        entry = of_rank.get(tuple(sizes), {})
        assert 'task' in entry, entry.get('error', 'not reached')
        loss, gradients = entry['task']
        assert loss == pytest.approx(result['contrastive_loss'].item(), rel=1e-12)
        torch.testing.assert_close(gradients, expected, **ROUND_OFF)


@pytest.mark.slow
def test_two_processes_of_a_plain_loop_equal_one(two_processes):
    student, sscl = _contrastive_loop()
    x, _ = _batch(9, dtype=torch.float64)
    loss = 0 * student(x).sum() + sscl(x)
    loss.backward()
    for of_rank in two_processes:
        value, gradients = of_rank[5, 4]['loop']
        assert value == pytest.approx(loss.item(), rel=1e-12)
        torch.testing.assert_close(gradients, _cat_gradients(student, sscl), **ROUND_OFF)


@pytest.mark.slow
def test_gathered_rows_come_in_order_and_their_gradients_go_home(two_processes):
    rows = torch.cat([torch.arange(20.).view(5, 4), torch.arange(16.).view(4, 4) + 100])
    for rank, of_rank in enumerate(two_processes):
        gathered, grad = of_rank[5, 4]['gather']
        assert torch.equal(gathered, rows)
        expected = 3 * torch.arange(9.).view(9, 1).expand(9, 4)  # weights 1 and 2 of the two processes, summed
        assert torch.equal(grad, expected[:5] if rank == 0 else expected[5:])


def test_one_process_gathers_nothing():
    rows = torch.randn(3, 2)
    assert gather_rows(rows) is rows


# ------------------------------------------------------------------------------------------------------------- compile

def test_task_compiles_as_one_graph():
    """Student, taps and losses without a graph break, in float64; the backend is dynamo's and autograd's part only."""
    tasks = []
    for _ in range(2):
        student, teacher = short_resnet(timesteps=T), short_resnet()
        with torch.random.fork_rng():
            torch.manual_seed(0)  # for the projections
            tasks.append(SSCLTask(student, teacher, 'sscl', verbose=False, dtype=torch.float64))
    tasks[1].trainable_module = torch.compile(tasks[1].trainable_module, fullgraph=True, backend='aot_eager')
    x, y = _batch(dtype=torch.float64)
    results = []
    for task in tasks:
        task.to(torch.float64).train()
        loss = task(x, y)['loss']
        loss.backward()
        results.append((loss.detach(), [p.grad for p in task.trainable_module.parameters()], task.stats))
    (loss, grads, stats), (compiled_loss, compiled_grads, compiled_stats) = results
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-12, atol=0)
    for got, expected in zip(compiled_grads, grads):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert compiled_stats.keys() == stats.keys()
    for layer in stats:
        assert compiled_stats[layer] == pytest.approx(stats[layer], rel=1e-5)
