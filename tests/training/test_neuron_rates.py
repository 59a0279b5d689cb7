"""What neurons say of their training: learning rates of single parameters, and what follows the epochs."""
import pytest
import timm
import torch

GATES = ('gate_leak', 'gate_input', 'gate_reset')


def _glif():
    return timm.create_model('spiking_test_resnet', num_classes=10, timesteps=2, neuron='glif')


def _of_each(run, key, default=None):
    names = {id(p): n for n, p in run.task.student.named_parameters()}
    found = [(names[id(p)], g.get(key, default)) for g in run.optimizer.param_groups for p in g['params']]
    assert len(found) == len(names) == len(dict(found))  # every parameter once
    return dict(found)


@pytest.mark.parametrize('argv', [(), ('--sched', 'none'), ('--opt', 'lookahead_adamw')], ids=' '.join)
def test_glifs_gates_learn_at_a_tenth_of_the_rate(fit, argv):
    """As in the authors' code; with the schedule's warmup as without any."""
    rates = _of_each(fit(['--lr', .2, *argv], _glif()), 'lr')
    gates = {rate for name, rate in rates.items() if name.endswith(GATES)}
    others = {rate for name, rate in rates.items() if not name.endswith(GATES)}
    assert len(others) == len(gates) == 1 and gates.pop() == pytest.approx(.1 * others.pop())
    assert sum(name.endswith(GATES) for name in rates) == 3 * 12


def test_the_schedule_keeps_the_ratio(fit):
    run = fit(['--lr', .2, '--epochs', 4], _glif())
    run.scheduler.step(2)
    rates = _of_each(run, 'lr')
    assert rates['act1.gate_leak'] == pytest.approx(.1 * rates['act1.decay']) and rates['act1.decay'] < .2


def test_it_multiplies_layer_decay_and_keeps_weight_decay(fit):
    run = fit(['--layer-decay', .5], _glif())
    scales, decays = _of_each(run, 'lr_scale', 1.), _of_each(run, 'weight_decay')
    for name in 'layer1.0.act1', 'layer3.0.act2':
        assert scales[f'{name}.gate_input'] == pytest.approx(.1 * scales[f'{name}.decay'])
        assert scales[f'{name}.decay'] < 1
        assert decays[f'{name}.gate_input'] == 0


def test_other_neurons_change_no_group(fit):
    run = fit([], timm.create_model('spiking_test_resnet', num_classes=10, timesteps=2, neuron='plif'))
    assert len(run.optimizer.param_groups) == 2 and all('lr_scale' not in g for g in run.optimizer.param_groups)


# ---- masked_psn's mask

def _psn(warmup=.5, timesteps=4, **options):
    torch.manual_seed(0)
    return timm.create_model('spiking_test_resnet', num_classes=10, timesteps=timesteps, neuron='masked_psn',
                             neuron_kwargs=dict(mask_warmup=warmup, **options))


def test_the_mask_rises_with_the_training():
    model = _psn(mask=.8)
    neuron = model.act1
    weight, band = neuron.step_weight, torch.ones(4, 4).tril().triu(-1)
    for progress, m in (0., 0.), (.125, .2), (.25, .4), (.5, .8), (.9, .8):
        model.set_progress(progress)
        torch.testing.assert_close(neuron.matrix(), weight * (m * band + 1 - m))
    assert not neuron.is_causal
    whole = _psn().set_progress(.5)
    assert whole.act1.is_causal and torch.equal(whole.act1.matrix(), whole.act1.step_weight * band)


def test_the_progress_travels_with_the_model():
    """The output depends on it, unlike a surrogate's: a checkpoint in the middle of the warmup has its mask."""
    x = torch.randn(2, 3, 32, 32)
    model = _psn().set_progress(.25).eval()
    other = timm.create_model('spiking_test_resnet', num_classes=10).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.act1.matrix(), model.act1.matrix()) and torch.equal(other(x), model(x))
    before = other.act1.matrix().clone()
    assert not torch.equal(model.set_progress(1.).act1.matrix(), before)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(.9), use_buffers=True)
    model.set_progress(.25)
    average.update_parameters(model)
    assert average.module.act1.mask_progress == 250_000
    assert 'mask_progress' not in ' '.join(_psn(warmup=0.).state_dict())


def test_warmup_out_of_range():
    with pytest.raises(ValueError, match=r'mask_warmup=1.0: .* must lie in \[0, 1\)'):
        _psn(warmup=1.)
