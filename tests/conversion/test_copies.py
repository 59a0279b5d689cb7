"""Copies of a module that holds student, teacher and loss, evaluation of the loss, and another T later on."""
import copy
import gc
import io
import math
import pickle
import weakref

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel

import timm_sscl  # noqa: F401  registers the spiking_ names
from timm_sscl import SSCLLoss, SSCLTask

T = 2
BATCH_ONLY = dict(cka_momentum=1., temperature=0.1)


def _images(n=8, seed=0):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _models(teacher='test_resnet'):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = timm.create_model('spiking_test_resnet', timesteps=T, num_classes=5, zero_init_last=False)
        kwargs = dict(timesteps=T) if teacher.startswith('spiking') else {}
        return student.double().train(), timm.create_model(teacher, num_classes=5, **kwargs).double()


class _Whole(nn.Module):
    """A training module as Lightning users write it; in which order the parts are held is theirs."""

    def __init__(self, order=('student', 'teacher', 'sscl'), teacher='test_resnet', wrap=lambda m: m, **options):
        super().__init__()
        student, teacher = _models(teacher)
        sscl = SSCLLoss(student, wrap(teacher), **{**BATCH_ONLY, **options}).double()
        parts = dict(student=student, teacher=teacher, sscl=sscl)
        for name in order:
            self.add_module(name, parts[name])

    def forward(self, x):
        return F.cross_entropy(self.student(x), torch.arange(len(x)) % 5) + self.sscl(x)


def _num_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def _saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    'deepcopy': copy.deepcopy, 'pickle': lambda m: pickle.loads(pickle.dumps(m)), 'torch.save': _saved,
    'copy of a copy': lambda m: copy.deepcopy(copy.deepcopy(m)),
    'averaged model': lambda m: AveragedModel(m, use_buffers=True).module,
}
ORDERS = [('student', 'teacher', 'sscl'), ('sscl', 'teacher', 'student'), ('teacher', 'sscl', 'student')]


@pytest.mark.parametrize('order, duplicate', [
    *(pytest.param(ORDERS[0], duplicate, id=name) for name, duplicate in COPIES.items()),
    *(pytest.param(order, copy.deepcopy, id='-'.join(order)) for order in ORDERS[1:])])
def test_copy_of_all_three_has_a_live_loss_of_its_own(order, duplicate):
    whole = _Whole(order)
    x = _images()
    whole.student(x)  # a forward whose loss is not taken is no part of the copy
    twin = duplicate(whole)
    with pytest.raises(RuntimeError, match='no forward'):
        twin.sscl(x)
    value, twins = whole(x), twin(x)
    assert twins.item() == value.item()
    twins.backward()
    grads = [p.grad for p in twin.parameters() if p.requires_grad]
    assert all(p.grad is None for p in whole.parameters())
    value.backward()
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, [p for p in whole.parameters() if p.requires_grad]))
    # each follows its own student
    with torch.no_grad():
        twin.student.layer2[-1].conv2.weight.neg_()
    other = _images(seed=1)
    assert abs(twin(other).item() - whole(other).item()) > 1e-6
    twin.student(x)
    with pytest.raises(RuntimeError, match='no forward'):
        whole.sscl(x)
    twin.sscl.close()
    assert _num_hooks(twin.student) == _num_hooks(twin.teacher) == 0
    assert math.isfinite(whole(x).item())


def test_copy_with_a_wrapped_teacher():
    whole = _Whole(wrap=nn.DataParallel)
    twin = copy.deepcopy(whole)
    x = _images()
    assert twin(x).item() == whole(x).item()


def test_moving_a_copy_moves_its_own_teacher():
    whole = _Whole(('student', 'sscl', 'teacher'))
    twin = copy.deepcopy(whole)
    twin.sscl.float()
    assert next(twin.teacher.parameters()).dtype == torch.float32
    assert next(whole.teacher.parameters()).dtype == torch.float64


class _Pair(nn.Module):
    def __init__(self, model, sscl):
        super().__init__()
        self.model, self.sscl = model, sscl


@pytest.mark.parametrize('duplicate', COPIES.values(), ids=COPIES)
@pytest.mark.parametrize('which', ['student', 'teacher', 'none', 'block'])
def test_copy_without_one_of_the_models_says_so(which, duplicate):
    whole = _Whole()
    model = dict(student=whole.student, teacher=whole.teacher, none=nn.Identity(), block=whole.student.layer4)[which]
    twin = duplicate(_Pair(model, whole.sscl))
    x = _images()
    if which == 'student':
        twin.model(x)
    with pytest.raises(RuntimeError, match='copy that was made without its model'):
        twin.sscl(x)
    assert not any(p is q for p in twin.parameters() for q in whole.parameters())
    assert math.isfinite(whole(x).item())


def test_copy_of_the_loss_alone_holds_no_model():
    whole = _Whole()
    own = sum(v.numel() for v in whole.sscl.state_dict().values())
    size = len(pickle.dumps(whole.sscl))
    assert size < 2 * 8 * own  # float64, and what surrounds it; the teacher alone has more
    assert sum(p.numel() for p in whole.teacher.parameters()) > 2 * own


def test_copy_of_a_spiking_teachers_loss_keeps_its_timesteps():
    whole = _Whole(teacher='spiking_test_resnet')
    x = _images()
    taps = [*(getattr(m, f'layer{i}')[-1] for m in (whole.student, whole.teacher) for i in (1, 2, 3, 4))]
    seen = []
    handles = [m.register_forward_hook(lambda _m, _a, out: seen.append(out)) for m in taps]
    whole.student(x)
    value = whole.sscl(x)
    for handle in handles:
        handle.remove()
    pooled = [f.mean((2, 3)) for f in (seen[3], seen[7])]
    features = [*seen[:4], pooled[0]], [*seen[4:], pooled[1]]
    assert copy.deepcopy(whole.sscl).from_features(*features).item() == pytest.approx(value.item(), rel=1e-9)


def test_copies_of_the_student_record_nothing():
    whole = _Whole()
    twin, seen, x = copy.deepcopy(whole.student), [], _images()
    twin.layer1.register_forward_hook(lambda _m, _a, out: seen.append(weakref.ref(out)))
    twin.train()(x)
    gc.collect()
    assert len(seen) == 1 and seen[0]() is None  # nobody holds what a loss would have taken
    with pytest.raises(RuntimeError, match='no forward'):
        whole.sscl(x)


def test_copy_of_a_task_with_firing_rates():
    student, teacher = _models()
    task = SSCLTask(student, teacher, {'sscl': 1., 'firing_rate': 1.}, {'firing_rate': dict(target=(0.9, 1.))},
                    verbose=False, dtype=torch.float64).double().train()
    twin = copy.deepcopy(task)
    batch = _images(), torch.arange(8) % 5
    expected, result = task(*batch), twin(*batch)
    assert result['firing_rate_loss'].item() == expected['firing_rate_loss'].item() > 0
    assert result['loss'].item() == expected['loss'].item()
    with torch.no_grad():
        for bn in (m for m in twin.student.modules() if isinstance(m, nn.BatchNorm2d)):
            bn.bias.sub_(10.)  # silent
    assert twin(*batch)['firing_rate_loss'] > task(*batch)['firing_rate_loss']


# ---- another T

@pytest.mark.parametrize('timesteps', [None, T])
def test_set_timesteps_reaches_the_loss(timesteps):
    student, teacher = _models()
    sscl = SSCLLoss(student, teacher, timesteps=timesteps, **BATCH_ONLY).double()
    student.set_timesteps(4)
    fresh = SSCLLoss(student, teacher, **BATCH_ONLY).double()
    fresh.load_state_dict(sscl.state_dict())
    x = _images()
    student(x)
    assert sscl.timesteps == 4
    assert sscl(x).item() == fresh(x).item()


def test_set_timesteps_reaches_the_loss_of_a_copy():
    twin = copy.deepcopy(_Whole())
    twin.student.set_timesteps(3)
    assert twin.sscl.timesteps == 3 and math.isfinite(twin(_images()).item())


# ---- evaluation

def _trained():
    whole = _Whole(cka_momentum=0.5, queue_size=8)
    for seed in range(2):
        whole(_images(seed=seed))
    return whole


@pytest.mark.parametrize('mode', ['eval', 'loss left in training mode', 'no_grad in training mode'])
def test_validation_step(mode):
    whole = _trained()
    state = {k: v.clone() for k, v in whole.sscl.state_dict().items()}
    x = _images(6, seed=5)
    if mode != 'no_grad in training mode':
        whole.student.eval()
    if mode == 'eval':
        whole.sscl.eval()
    features = []
    taps = [*(getattr(whole.student, f'layer{i}')[-1] for i in (1, 2, 3, 4)), whole.student.global_pool]
    teacher_taps = [*(getattr(whole.teacher, f'layer{i}')[-1] for i in (1, 2, 3, 4)), whole.teacher.global_pool]
    buffers = {k: v.clone() for k, v in whole.student.state_dict().items()}
    with whole.sscl.record_in_eval(), torch.no_grad():
        for module in (*taps, *teacher_taps):
            module.register_forward_hook(lambda _m, _a, out: features.append(out))
        whole.student(x)
        value = whole.sscl(x)
        modes = [m.training for m in whole.sscl.modules()]
        # the same on the same features, by a loss in evaluation mode
        expected = copy.deepcopy(whole.sscl).eval().from_features(features[:5], features[5:])
    assert value.item() == expected.item() and not value.requires_grad
    assert modes == [m.training for m in whole.sscl.modules()]
    assert all(torch.equal(v, state[k]) for k, v in whole.sscl.state_dict().items())
    if mode != 'no_grad in training mode':
        assert all(torch.equal(v, buffers[k]) for k, v in whole.student.state_dict().items())


def test_evaluation_is_recorded_on_request_only():
    whole = _trained().eval()
    x = _images(seed=5)
    for enable, recorded in ((lambda: None, False), (whole.sscl.record_in_eval, True),
                             (lambda: whole.sscl.record_in_eval(False), False)):
        enable()
        whole.student(x)
        if recorded:
            assert math.isfinite(whole.sscl(x).item())
        else:
            with pytest.raises(RuntimeError, match='no forward'):
                whole.sscl(x)
    with whole.sscl.record_in_eval():
        with whole.sscl.record_in_eval():
            pass
        whole.student(x)
        assert math.isfinite(whole.sscl(x).item())
        whole.student(x)  # not taken
    with pytest.raises(RuntimeError, match='no forward'):
        whole.sscl(x)


def test_training_goes_on_as_if_there_had_been_no_evaluation():
    losses = []
    for evaluate in (False, True):
        whole = _trained()
        if evaluate:
            whole.student.eval()
            with whole.sscl.record_in_eval(), torch.no_grad():
                whole.student(_images(seed=8))
                whole.sscl(_images(seed=8))
            whole.student.train()
        losses.append(whole(_images(seed=3)).item())
    assert losses[0] == losses[1]


def test_evaluation_before_training_takes_the_batchs_cka(caplog):
    whole = _Whole(cka_floor=1e-3).eval()
    x = _images(16)
    with whole.sscl.record_in_eval():
        whole.student(x)
        whole.sscl(x)
    for values in whole.sscl.stats.values():
        assert math.isnan(values['cka_running'])
        assert values['weight'] == pytest.approx(1 / max(values['cka'], 1e-3), rel=1e-6)
    assert 'undefined' not in caplog.text


# ---- what cannot be learned from

class _Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.body = nn.ModuleList([nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 3)])
        self.head = nn.Linear(6, 5)
        self.use_reentrant = use_reentrant

    def _run_body(self, x):
        return self.body[1](self.body[0](x).relu()).relu()

    def forward(self, x):
        x = self.stem(x)
        if self.use_reentrant is None:
            x = self._run_body(x)
        else:
            x = torch.utils.checkpoint.checkpoint(self._run_body, x, use_reentrant=self.use_reentrant)
        return self.head(x.mean((2, 3)))


def _checkpointed(use_reentrant, taps):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student, teacher = _Checkpointed(use_reentrant).double(), _Checkpointed(None).double()
    return student, SSCLLoss(student, teacher, taps, input_size=(3, 16, 16), **BATCH_ONLY).double()


def test_tap_inside_a_reentrantly_checkpointed_region_names_the_switch():
    student, sscl = _checkpointed(True, ['stem', 'body.0', 'body.1'])
    x = _images()[..., :16, :16]
    student(x)
    with pytest.raises(RuntimeError, match=r'body\.0, body\.1 .*use_reentrant=False'):
        sscl(x)


@pytest.mark.parametrize('use_reentrant,taps', [(False, ['stem', 'body.0', 'body.1']), (True, ['stem', 'head'])])
def test_other_checkpointed_taps_learn(use_reentrant, taps):
    grads = []
    for checkpointing in (None, use_reentrant):
        student, sscl = _checkpointed(checkpointing, taps)
        x = _images()[..., :16, :16]
        student(x)
        sscl(x).backward()
        grads.append([p.grad for p in student.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) >= 4
    for plain, checkpointed in zip(*grads):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-9, atol=1e-12)  # sums in another order


def test_frozen_part_is_said_once(caplog):
    whole = _Whole()
    for part in (whole.student.conv1, whole.student.bn1, whole.student.layer1):
        part.requires_grad_(False)
    for seed in range(3):
        whole(_images(seed=seed))
    said = [r.getMessage() for r in caplog.records if 'no parameter before' in r.getMessage()]
    assert len(said) == 1 and 'before layer1 of' in said[0]
