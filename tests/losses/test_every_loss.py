"""What holds for every registered loss, a user's too: ranges, minimum, gradients, parts of a batch, precision."""
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from processes import run_processes
from torch.utils._python_dispatch import TorchDispatchMode

from timm_sscl.losses import TrainStep, create_loss, list_losses, loss_spec

T, B, K = 2, 6, 5
CHANNELS = (3, 4)  # of two taps, equal in student and teacher
SAMPLES = 50  # of the training set
LOSSES = list_losses()
DRAWS = {'bkdsnn'}  # draw numbers for every sample in training mode


def _randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _step(timesteps=T, batch=B, classes=K, dtype=torch.float64, equal=False, potential=None):
    """A step of random tensors.

    With equal=True the student shows what the teacher shows, at every timestep. With a potential, all have it.
    """
    teacher_logits = 2 * _randn(batch, classes, seed=1)
    logits = teacher_logits.repeat(timesteps, 1, 1) if equal else 2 * _randn(timesteps, batch, classes)
    shapes = [(CHANNELS[0], 4, 4), (CHANNELS[1],)]
    teacher = [_randn(1, batch, *shape, seed=2 + i) for i, shape in enumerate(shapes)]
    student = [a.repeat(timesteps, *(1,) * (a.ndim - 1)) if equal else _randn(timesteps, *a.shape[1:], seed=5 + i).abs()
               for i, a in enumerate(teacher)]
    layers = 'abc'
    rates = [_randn(seed=9 + i).sigmoid() for i in range(len(layers))]
    shapes = [(timesteps, batch, 3, 4, 4), (timesteps, batch, 4), (timesteps, batch, 2, 3)]
    membranes = [torch.full(s, potential).double() if potential is not None else _randn(*s, seed=12 + i)
                 for i, s in enumerate(shapes)]
    wide = torch.promote_types(dtype, torch.float32)  # rates are means in float32 at least, as potentials are
    tensors = [logits.to(dtype), *(s.to(dtype) for s in student), *(x.to(wide) for x in (*rates, *membranes))]
    logits, *rest = (t.clone().requires_grad_() for t in tensors)
    return TrainStep(
        torch.zeros(batch, 3, 8, 8, dtype=dtype), torch.arange(batch) % classes, logits, nn.Linear(2, 2),
        teacher_logits.to(dtype), rest[:2], [a.to(dtype) for a in teacher], dict(zip(layers, rest[2:5])),
        _head(classes, dtype), torch.tensor(0.5), dict(zip(layers, rest[5:])), (7 * torch.arange(batch)) % SAMPLES)


def _head(classes, dtype):
    """The teacher's classifier."""
    head = nn.Linear(CHANNELS[1], classes)
    with torch.no_grad():
        head.weight.copy_(_randn(classes, CHANNELS[1], seed=30))
        head.bias.copy_(_randn(classes, seed=31))
    return head.to(torch.promote_types(dtype, torch.float32)).requires_grad_(False)


def _create(name, dtype=torch.float64):
    spec = loss_spec(name)
    taps = {}
    if spec.needs_features:
        taps = dict(names=['a', 'b'], student_channels=CHANNELS, teacher_channels=CHANNELS)
    if spec.needs_shapes:
        taps.update(student_shapes=[(T, 3, 4, 4), (T, 4)], teacher_shapes=[(1, 3, 4, 4), (1, 4)])
    if spec.needs_index:
        taps.update(num_samples=SAMPLES)
    torch.manual_seed(0)
    return create_loss(name, **taps).to(dtype).train()


def _inputs(step):
    """What gradients flow to."""
    return [step.step_logits, *step.student_features, *step.firing_rates.values(), *step.membranes.values()]


def _gradients(loss, step):
    gradients = torch.autograd.grad(loss, _inputs(step), allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, _inputs(step))]


@pytest.mark.parametrize('name', LOSSES)
@pytest.mark.parametrize('options', [{}, dict(timesteps=1), dict(batch=4), dict(classes=2), dict(classes=1)], ids=str)
def test_value_and_gradient_are_finite(name, options):
    step = _step(**options)
    loss = _create(name)(step)
    assert loss.shape == () and torch.isfinite(loss)
    gradients = _gradients(loss, step)
    assert all(torch.isfinite(g).all() for g in gradients)
    if options.get('classes') != 1:
        assert any(g.abs().max() > 0 for g in gradients)


@pytest.mark.parametrize('name', [name for name in LOSSES if loss_spec(name).minimum == 'teacher'])
@pytest.mark.parametrize('options', [{}, dict(timesteps=1), dict(classes=1)], ids=str)
def test_smallest_where_the_student_is_the_teacher(name, options):
    loss = _create(name)
    step = _step(**options, equal=True)
    value = loss(step)
    # round-off of float64, times temperature^2; 1e-7 beside a deviation
    assert value.item() == pytest.approx(0., abs=1e-12)
    assert max(g.abs().max().item() for g in _gradients(value, step)) < 1e-10
    if options.get('classes') != 1:
        assert loss(_step()).item() > 1e-3


@pytest.mark.parametrize('name', [name for name in LOSSES if isinstance(loss_spec(name).minimum, float)])
@pytest.mark.parametrize('options', [{}, dict(timesteps=1)], ids=str)
def test_smallest_at_a_potential(name, options):
    loss = _create(name)
    step = _step(**options, potential=loss_spec(name).minimum)
    value = loss(step)
    assert value.item() == pytest.approx(0., abs=1e-12)
    assert max(g.abs().max().item() for g in _gradients(value, step)) < 1e-10
    assert loss(_step(**options)).item() > 1e-3


# these hold parts fixed that move with the inputs: weights, the mean of the steps, the prediction of the next step
@pytest.mark.parametrize('name', sorted({*LOSSES} - {'sscl', 'twsnn', 'hta_kl', 'seal_kd', 'meom', 'bkdsnn'}))
def test_gradient_is_that_of_differences(name):
    """Along a random direction of all inputs, by a central difference in float64."""
    step, loss = _step(), _create(name)
    loss(step)  # what the first step sets and later ones keep
    loss.eval()

    def run():
        torch.manual_seed(1)  # of losses that draw
        return loss(step)

    gradients = _gradients(run(), step)
    directions = [_randn(*x.shape, seed=20 + i) for i, x in enumerate(_inputs(step))]
    slope = sum((g * d).sum() for g, d in zip(gradients, directions)).item()
    h, sides = 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            for x, d in zip(_inputs(step), directions):
                x.add_(sign * h * d)
            sides.append(run().item())
            for x, d in zip(_inputs(step), directions):
                x.sub_(sign * h * d)
    # the difference's own error is h^2, its round-off 1e-16 / h
    assert (sides[0] - sides[1]) / (2 * h) == pytest.approx(slope, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize('name', LOSSES)
def test_order_of_the_samples_does_not_matter(name):
    order = torch.randperm(B, generator=torch.Generator().manual_seed(3))
    step = _step()
    losses = [_create(name).train(name not in DRAWS)(x).item() for x in (_part(step, order), step)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def _part(step, part):
    return TrainStep(
        step.input[part], step.target[part], step.step_logits[:, part], step.student, step.teacher_logits[part],
        [s[:, part] for s in step.student_features], [a[:, part] for a in step.teacher_features], step.firing_rates,
        step.teacher_head, step.progress, {k: u[:, part] for k, u in step.membranes.items()}, step.index[part])


@pytest.mark.parametrize('name', [name for name in LOSSES if not loss_spec(name).global_batch])
def test_parts_of_a_batch_add_up(name):
    """A loss that is no global batch's is a mean over samples: so k processes give what one gives."""
    step, loss = _step(), _create(name).train(name not in DRAWS)
    whole = loss(step).item()
    parts = sum(n / B * loss(_part(step, part)).item() for n, part in ((4, slice(0, 4)), (2, slice(4, 6))))
    assert parts == pytest.approx(whole, rel=1e-10)


GLOBAL = [name for name in LOSSES if loss_spec(name).global_batch]


def _on_a_process(rank=None):
    """Loss and gradient by the whole batch, or by a process's part of it, of every global loss."""
    results = {}
    for name in GLOBAL:
        step = _step(batch=10)
        part = slice(None) if rank is None else (slice(0, 6), slice(6, 10))[rank]
        loss = _create(name)(_part(step, part))
        gradients = _gradients(loss, step)
        gradients = [*gradients[:3], *gradients[6:]]  # but rates, which are this process's own
        if rank is not None:  # DDP's mean
            for g in gradients:
                dist.all_reduce(g)
                g /= 2
        results[name] = [loss.detach(), *gradients]
    return results


def test_two_processes_are_one(tmp_path):
    """All but the terms of sscl's CKA, which are means over the processes' own batches."""
    expected = _on_a_process()
    for of_rank in run_processes(_on_a_process, 2, tmp_path):
        for name in set(GLOBAL) - {'sscl', 'firing_rate'}:
            for got, want in zip(of_rank[name], expected[name]):
                torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize('name', LOSSES)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(name, dtype):
    """Of the same rounded numbers in float64 the value is the same, to what float32 sums leave."""
    step = _step(dtype=dtype)
    value = _create(name, torch.float32)(step)
    assert value.dtype == torch.float32
    wide = TrainStep(
        step.input.double(), step.target, step.step_logits.double(), step.student, step.teacher_logits.double(),
        [s.double() for s in step.student_features], [a.double() for a in step.teacher_features],
        {k: r.double() for k, r in step.firing_rates.items()}, _head(K, torch.float64), step.progress,
        {k: u.double() for k, u in step.membranes.items()}, step.index)
    # the mean over time of half precision logits is rounded to their 8 or 11 bits
    assert value.item() == pytest.approx(_create(name)(wide).item(), rel=2e-2 if dtype == torch.bfloat16 else 3e-3)


class _NoScalars(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('name', LOSSES)
def test_a_step_reads_no_number(name):
    loss = _create(name)
    loss(_step())
    step = _step()
    with _NoScalars():
        loss(step).backward()


@pytest.mark.parametrize('name', [name for name in LOSSES if loss_spec(name).needs_labels])
def test_soft_targets_are_refused_where_labels_are_needed(name):
    step = _step()
    step.target = torch.full((B, K), 1 / K)
    with pytest.raises(ValueError, match=f"loss '{name}' needs one label per sample.*mixup"):
        _create(name)(step)


@pytest.mark.parametrize('name', LOSSES)
def test_state_is_changed_in_place(name):
    """A captured CUDA graph goes on with the tensors that it saw."""
    loss = _create(name)
    state = {**dict(loss.named_buffers()), **dict(loss.named_parameters())}
    for _ in range(2):
        loss(_step(batch=8))
    after = {**dict(loss.named_buffers()), **dict(loss.named_parameters())}
    assert after.keys() == state.keys() and all(after[key] is tensor for key, tensor in state.items())


@pytest.mark.parametrize('name', LOSSES)
def test_autocast_changes_the_maps_only(name):
    """Under autocast, linear maps and convolutions of a loss run in bfloat16, all else in float32."""
    values = []
    for enabled in (False, True):
        step = _step(dtype=torch.float32)
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            loss = _create(name, torch.float32)(step)
        assert loss.dtype == torch.float32
        assert all(g.isfinite().all() for g in _gradients(loss, step))
        values.append(loss.item())
    assert values[1] == pytest.approx(values[0], rel=3e-2)  # 8 bits, times temperatures as small as 0.07
