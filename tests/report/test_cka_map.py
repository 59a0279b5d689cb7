"""CKA of all pairs of layers against a slow float64 reference, and that measuring leaves no trace."""
import copy

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn

from timm_sscl import cka_map, convert_to_spiking


def net(seed, width=6):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 5, 3), nn.ReLU(),
                         nn.Flatten(), nn.Linear(5 * 16, 4))


def unbiased_hsic(K, L):
    """Eq. 5 of Song et al. 2012, literally."""
    n, one = len(K), np.ones(len(K))
    K, L = K - np.diag(np.diag(K)), L - np.diag(np.diag(L))
    return (np.trace(K @ L) + one @ K @ one * (one @ L @ one) / (n - 1) / (n - 2)
            - 2 / (n - 2) * one @ K @ L @ one) / (n * (n - 3))


def reference(student, teacher):
    """CKA from the features of every batch, (n, p) per layer."""
    terms = []
    for s, a in zip(student, teacher):
        grams = [[f.double().numpy() @ f.double().numpy().T for f in side] for side in (s, a)]
        cross = [[unbiased_hsic(K, L) for L in grams[1]] for K in grams[0]]
        terms.append((np.array(cross), *(np.array([unbiased_hsic(K, K) for K in side]) for side in grams)))
    cross, own_s, own_a = (np.mean([t[i] for t in terms], 0) for i in range(3))
    return cross / np.sqrt(np.outer(own_s, own_a))


def features(model, batches, layers, steps):
    """Outputs (n, p) of layers, of all timesteps side by side, per batch."""
    out = []
    for x in batches:
        got = {}
        handles = [model[i].register_forward_hook(lambda m, args, y, i=i: got.update({i: y})) for i in layers]
        with torch.no_grad():
            y = model(x)
        for handle in handles:
            handle.remove()
        out.append([torch.cat(got[i].chunk(steps), 1).flatten(1) if steps == 1 else
                    torch.cat([part.flatten(1) for part in got[i].chunk(steps)], 1) for i in layers] + [y])
    return out


@pytest.fixture
def batches():
    torch.manual_seed(1)
    return [torch.randn(n, 3, 8, 8) for n in (9, 9, 7)]


def test_all_pairs_are_the_reference(batches):
    teacher, student = net(1).eval(), convert_to_spiking(net(2), timesteps=3, v_threshold=.2).eval()
    found = cka_map(student, teacher, [(x, torch.zeros(len(x))) for x in batches])
    assert found.student == found.teacher == ['2', '4', 'logits'] and found.batches == 3 and not found.left_out
    wanted = reference(features(student, batches, (2, 4), 3), features(teacher, batches, (2, 4), 1))
    # the Gram matrices are float32: 1e-7 of sums over some hundred terms
    np.testing.assert_allclose(found.values.numpy(), wanted, rtol=1e-4, atol=1e-5)
    assert np.abs(wanted - found.values.numpy().T).max() > 1e-3  # a transposed map would be seen


def test_a_model_with_itself_has_ones_and_named_layers_are_taken(batches):
    model = net(3).eval()
    found = cka_map(model, model, batches, student_layers=['3', 'logits'], teacher_layers=['3', 'logits'])
    assert found.student == ['3', 'logits']
    torch.testing.assert_close(found.values.diagonal(), torch.ones(2, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.values, found.values.T, atol=1e-6, rtol=0)


def test_a_silent_layer_has_no_cka(batches):
    student = convert_to_spiking(net(2), timesteps=2, v_threshold=1e6)
    assert cka_map(student, net(1), batches).values[0].isnan().all()


def test_small_batches_are_skipped_and_none_is_an_error(batches):
    student, teacher = convert_to_spiking(net(2), timesteps=2), net(1)
    with_rest = cka_map(student, teacher, [*batches, batches[0][:3]])
    assert with_rest.batches == 3
    assert torch.equal(with_rest.values, cka_map(student, teacher, batches).values)
    with pytest.raises(ValueError, match='no batch has 4 images'):
        cka_map(student, teacher, [batches[0][:3]])


@pytest.mark.parametrize('side', ['student', 'teacher'])
def test_an_unknown_layer_is_named(side, batches):
    with pytest.raises(ValueError, match=f"{side}_layers: Sequential has no module 'layer9'"):
        cka_map(net(2), net(1), batches, **{f'{side}_layers': ['layer9']})


def test_the_teacher_may_see_other_images(batches):
    teacher = net(1).eval()
    found = cka_map(teacher, teacher, batches, teacher_input=lambda x: 2 * x.flip(0))
    plain = cka_map(teacher, teacher, batches)
    assert (found.values - plain.values).abs().max() > .1  # other images in another order


def test_a_module_that_runs_twice_has_two_rows(batches):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.fc = nn.ReLU(), nn.Linear(192, 192)

        def forward(self, x):
            return self.act(self.fc(self.act(x.flatten(1))))

    assert cka_map(Twice(), Twice(), batches).student == ['act', 'act#2', 'logits']


def test_windows_in_the_batch_axis_are_left_out_and_said(batches):
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(x.reshape(len(x) * 4, -1)).reshape(len(x), -1)

    found = cka_map(Windows(), Windows(), batches)
    assert found.student == ['logits'] and found.left_out['student act'] == 'its output has 36 rows for 9 images'


def test_measuring_leaves_no_trace(batches):
    student = timm.create_model('spiking_test_resnet', timesteps=2, num_classes=4).train()
    teacher = timm.create_model('test_resnet', num_classes=4).train()
    images = [torch.randn(5, 3, 32, 32)]
    before = [copy.deepcopy(m.state_dict()) for m in (student, teacher)]
    random = torch.get_rng_state()
    found = cka_map(student, teacher, images)
    assert len(found.student) == len(found.teacher) == 13
    assert torch.equal(torch.get_rng_state(), random)
    for model, state in zip((student, teacher), before):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(m.training and not m._forward_hooks for m in model.modules())


def test_event_frames_are_compared_over_all_their_steps():
    from timm_sscl import accept_frames
    torch.manual_seed(0)
    frames = [(torch.rand(6, 3, 2, 32, 32) > .5).float()]
    student = timm.create_model('spiking_test_resnet', timesteps=3, num_classes=4, in_chans=2)
    teacher = accept_frames(timm.create_model('test_resnet', num_classes=4, in_chans=2))
    found = cka_map(student, teacher, frames)
    assert found.student == found.teacher and not found.left_out


@pytest.mark.parametrize('scale', [1e-12, 1e10])
def test_scale_of_a_layer_does_not_matter(scale):
    """Beyond the range of float32, too, in which the HSIC of a layer with itself has the scale to the fourth power."""
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(x.flatten(1)) * scale

    images = [torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(0))]
    values = cka_map(Scaled(), Scaled(), images).values
    torch.testing.assert_close(values, torch.ones(2, 2, dtype=torch.float64), rtol=0, atol=1e-5)  # float32 features
