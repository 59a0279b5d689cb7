"""The SSCL criterion of its parts: weightings against loops, objects and names alike, and states of version 0.1.0."""
import inspect
import pickle

import pytest
import torch

from timm_sscl import SSCLLoss
from timm_sscl.losses import (
    CKAWeighting, FixedWeighting, FlattenedProjection, InfoNCECritic, InverseCKAWeighting, NCECritic, PooledProjection,
    QueuedCritic, ShuffledWeighting, SSCLCriterion, UncertaintyWeighting, UniformWeighting, loss_spec)

CKA = [0.9, 0.05, 0.4, float('nan')]
USED = [0.9, 0.1, 0.4, 0.1]  # with the floor 0.1
INVERSE = [1 / value for value in USED]
TOTAL = sum(INVERSE)


def _randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _features(n=6, seed=0):
    student = [_randn(2, n, 3, 4, 4, seed=seed), _randn(2, n, 4, seed=seed + 1), _randn(2, n, 5, 2, 2, seed=seed + 2)]
    teacher = [s.mean(0, keepdim=True) + noise * _randn(1, *s.shape[1:], seed=seed + 9)
               for s, noise in zip(student, (0.5, 1., 2.))]
    return student, teacher


def _criterion(**options):
    torch.manual_seed(0)
    return SSCLCriterion(['a', 'b', 'c'], [3, 4, 5], [3, 4, 5], **options).double().train()


def _bound(weighting):
    weighting.bind(4)
    return weighting.double()(torch.tensor(CKA, dtype=torch.float64)).tolist()


# ---- weightings

@pytest.mark.parametrize('weighting, expected', [
    (UniformWeighting(), [1., 1., 1., 1.]),
    (UniformWeighting('layers'), [1., 1., 1., 1.]),
    (UniformWeighting('inverse_cka'), [TOTAL / 4] * 4),
    (InverseCKAWeighting(), INVERSE),
    (InverseCKAWeighting('layers'), [4 * w / TOTAL for w in INVERSE]),
    (CKAWeighting('own'), USED),
    (CKAWeighting(), [u / sum(USED) * TOTAL for u in USED]),
    (CKAWeighting('layers'), [u / sum(USED) * 4 for u in USED]),
    (FixedWeighting([1., 2., 3., 4.], 'own'), [1., 2., 3., 4.]),
    (FixedWeighting([1., 2., 3., 4.]), [k / 10 * TOTAL for k in (1, 2, 3, 4)]),
    (UncertaintyWeighting(), [TOTAL / 4] * 4),  # before training
], ids=lambda x: f'{type(x).__name__}-{x.total}' if hasattr(x, 'total') else '')
def test_weights_against_loops(weighting, expected):
    assert _bound(weighting) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize('seed', range(5))
def test_shuffled_weights_are_the_same_at_other_places(seed):
    torch.manual_seed(seed)
    state = torch.get_rng_state()
    weighting = ShuffledWeighting()
    weights = _bound(weighting)
    assert torch.equal(torch.get_rng_state(), state)
    assert sorted(weights) == pytest.approx(sorted(INVERSE), rel=1e-12)
    assert all(place != i for i, place in enumerate(weighting.order.tolist()))
    assert weights == pytest.approx([INVERSE[place] for place in weighting.order.tolist()], rel=1e-12)
    other = ShuffledWeighting()
    other.bind(4)
    other.load_state_dict(weighting.state_dict())
    assert torch.equal(other.order, weighting.order)


def test_uncertainty_learns_the_reciprocals_of_the_losses():
    """The penalty is least at weights 1 / L; their total is that of 1 / CKA all the while."""
    weighting = UncertaintyWeighting()
    weighting.bind(3)
    weighting.double()
    losses = torch.tensor([0.5, 1., 4.], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD(weighting.parameters(), lr=0.3)
    for _ in range(300):
        optimizer.zero_grad()
        penalty = weighting.penalty(losses)
        assert penalty.item() == 0.
        penalty.backward()
        optimizer.step()
    assert losses.grad is None  # trained by the weighted sum alone
    cka = torch.tensor([0.5, 0.5, 0.25], dtype=torch.float64)
    weights = weighting(cka)
    reciprocals = torch.tensor([2., 1., 0.25], dtype=torch.float64)
    torch.testing.assert_close(weights, reciprocals / reciprocals.sum() * 8, rtol=1e-9, atol=0)
    assert not weights.requires_grad


@pytest.mark.parametrize('name', ['reverse', 'fixed', 'shuffled', 'uncertainty', 'uniform_matched', 'cka'])
def test_criterion_weighs_at_the_total_of_one_over_cka(name):
    options = dict(layer_weights=[1., 2., 4.]) if name == 'fixed' else {}
    criterion = _criterion(weighting=name, cka_floor=1e-3, **options)
    for seed in (0, 10):
        loss = criterion(*_features(seed=seed))
    stats = list(criterion.stats.values())
    inverse = [1 / max(v['cka_running'], 1e-3) for v in stats]
    weights = [v['weight'] for v in stats]
    assert sum(weights) == pytest.approx(sum(inverse), rel=1e-6)  # stats are float32
    assert loss.item() == pytest.approx(sum(w * v['nce'] for w, v in zip(weights, stats)), rel=1e-6)
    if name != 'cka':
        assert weights != pytest.approx(inverse, rel=0.01)


def test_uncertainty_trains_with_the_criterion():
    criterion = _criterion(weighting='uncertainty')
    loss = criterion(*_features())
    loss.backward()
    nce = torch.tensor([v['nce'] for v in criterion.stats.values()])
    # d/ds (e^-s L + s) at s = 0
    torch.testing.assert_close(criterion.weighting.log_variance.grad.float(), 1 - nce, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('create, words', [
    (lambda: UniformWeighting('all'), "total='all': must be one of own, layers, inverse_cka"),
    (lambda: InverseCKAWeighting(floor=0.), 'cka_floor=0.0'),
    (lambda: FixedWeighting([1., 0.]), 'layer_weights=.*positive'),
    (lambda: _criterion(weighting=FixedWeighting([1., 2.])), 'there are 2 for 3 layers'),
    (lambda: _criterion(weighting='fixed'), "layer_weights=None: go with weighting='fixed'"),
    (lambda: _criterion(weighting='cka', layer_weights=[1., 2., 3.]), "layer_weights=.*weighting='cka'"),
    (lambda: SSCLCriterion(['a'], [3], [3], weighting='shuffled'), '2 layers or more'),
    (lambda: QueuedCritic(InfoNCECritic(), 0), 'queue_size=0'),
    (lambda: NCECritic(0.), 'temperature=0.0'),
    (lambda: PooledProjection(0), 'dim=0'),
    (lambda: _criterion(critic=NCECritic(), temperature=0.5), 'temperature=0.5: critic is given as NCECritic'),
    (lambda: _criterion(projection=PooledProjection(), dim=4), 'dim=4: projection is given as PooledProjection'),
    (lambda: _criterion(weighting=UniformWeighting(), cka_floor=0.5), 'cka_floor=0.5: weighting is given as Uniform'),
])
def test_errors(create, words):
    with pytest.raises(ValueError, match=words):
        create()


def test_unknown_setting_raises():
    with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):
        _criterion(temprature=0.1)


# ---- objects and names

@pytest.mark.parametrize('objects, names', [
    (dict(critic=InfoNCECritic(0.07)), dict(critic='infonce', temperature=0.07)),
    (dict(critic=NCECritic(0.1)), dict(critic='normalized', temperature=0.1)),
    (dict(critic=NCECritic(0.1, normalize=False)), dict(critic='literal', temperature=0.1)),
    (dict(critic=QueuedCritic(InfoNCECritic(0.2), 8)), dict(queue_size=8)),
    (dict(weighting=InverseCKAWeighting('layers', floor=0.3)), dict(weighting='cka_mean1', cka_floor=0.3)),
    (dict(weighting=UniformWeighting()), dict(weighting='uniform')),
    (dict(projection=PooledProjection(16)), dict(dim=16)),
])
def test_objects_are_what_the_names_make(objects, names):
    one, other = _criterion(**objects), _criterion(**names)
    assert list(one.state_dict()) == list(other.state_dict())
    for seed in (0, 10, 20):
        assert one(*_features(seed=seed)).item() == other(*_features(seed=seed)).item()
    assert one.stats == other.stats


def test_flattened_projection_as_an_object():
    shapes = {f'{whose}_shapes': [(t, 3, 4, 4), (t, 4), (t, 5, 2, 2)] for whose, t in (('student', 2), ('teacher', 1))}
    one, other = (_criterion(projection=p, **shapes) for p in (FlattenedProjection(), 'flattened'))
    assert one(*_features()).item() == other(*_features()).item()


def test_options_of_the_loss_are_declared_once():
    """What SSCLLoss spells out is what the loss 'sscl' declares."""
    declared = {name: option.default for name, option in loss_spec('sscl').options.items()}
    parameters = inspect.signature(SSCLLoss).parameters.items()
    assert {name: p.default for name, p in parameters if p.kind is p.KEYWORD_ONLY} == declared


# ---- version 0.1.0

def _state_of_0_1_0(criterion):
    return {key.replace('critic.', ''): value for key, value in criterion.state_dict().items()}


def test_state_dict_of_0_1_0():
    criterion = _criterion(queue_size=8)
    for seed in (0, 10):
        criterion(*_features(seed=seed))
    state = _state_of_0_1_0(criterion)
    assert {'queue', 'queue_filled', 'g_student.0.weight', 'g_teacher.2.bias', 'running_cka.1.mean_terms'} <= set(state)
    fresh = _criterion(queue_size=8)
    fresh.load_state_dict(state)
    nested = torch.nn.ModuleDict({'sscl': _criterion(queue_size=8)})
    nested.load_state_dict({f'sscl.{key}': value for key, value in state.items()})
    for seed in (20, 30):
        value = criterion(*_features(seed=seed)).item()
        assert fresh(*_features(seed=seed)).item() == nested['sscl'](*_features(seed=seed)).item() == value


@pytest.mark.parametrize('options', [
    dict(queue_size=8, critic='normalized', temperature=0.1), dict(weighting='cka_mean1', cka_floor=0.3, dim=16)],
    ids=str)
def test_pickle_of_0_1_0(options):
    """It kept names and numbers where there are objects now."""
    criterion = _criterion(**options)
    criterion(*_features())
    known = {name: option.default for name, option in loss_spec('sscl').options.items()}
    flat = {**known, **options}
    old = dict(criterion.__dict__)
    old['_modules'] = {k: v for k, v in old['_modules'].items() if k not in ('critic', 'weighting')}
    old['_buffers'] = dict(queue=criterion.queue, queue_filled=criterion.queue_filled)
    old.update(temperature=flat['temperature'], critic=flat['critic'], weighting=flat['weighting'],
               cka_floor=flat['cka_floor'], projection='pooled')
    old = pickle.loads(pickle.dumps(old))
    again = SSCLCriterion.__new__(SSCLCriterion)
    again.__setstate__(old)
    assert list(again.state_dict()) == list(criterion.state_dict())
    for seed in (10, 20):
        assert again(*_features(seed=seed)).item() == criterion(*_features(seed=seed)).item()
