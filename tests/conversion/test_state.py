"""Settings and gains are state: every way in which state is loaded, copied or averaged gives the same numbers."""
import copy
import functools
import io
import logging
import pickle
from collections import OrderedDict

import accelerate
import pytest
import safetensors.torch
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
from timm.models import clean_state_dict, load_checkpoint
from timm.utils import ModelEmaV2, ModelEmaV3
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from timm_sscl import LIF, calibrate, convert_ann, convert_to_spiking

K = 5
NAME = 'test_resnet'
TINY = dict(num_classes=K, channels=(8, 8, 8, 8), stem_width=4)
SETTINGS = dict(timesteps=3, tau=.5, v_threshold=.7, v_reset='soft')


def images(batch=4):
    return 2 * torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def cached(create):
    """Builds once for each argument and hands out copies."""
    build = functools.lru_cache(maxsize=None)(create)
    return functools.wraps(create)(lambda *args, **kwargs: copy.deepcopy(build(*args, **kwargs)))


@cached
def ann(seed=0):
    """A network that fires in evaluation mode: its norms' statistics are those of the images."""
    torch.manual_seed(seed)
    model = timm.create_model(NAME, **TINY)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(.1 * torch.randn_like(p))
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.momentum = None
        model.train()(images(16))
    return model.eval()


def fresh(**settings):
    """Another model than any source, with the default settings."""
    return convert_to_spiking(ann(seed=1), **settings)


@cached
def plain():
    return convert_to_spiking(ann(), **SETTINGS)


@cached
def calibrated():
    model = plain()
    calibrate(model, images(16))
    return model


@cached
def converted():
    return convert_ann(ann(), images(16), timesteps=6)


@torch.no_grad()
def logits(model):
    return model.eval()(images(), per_step=True)


@torch.no_grad()
def same(model, source):
    assert model.timesteps == source.timesteps
    torch.testing.assert_close(logits(model), logits(source), rtol=0, atol=0)
    torch.testing.assert_close(model(images()), source(images()), rtol=0, atol=0)
    assert model.settings == source.settings


# ---- every way of getting from a source to a model with its numbers; (source, folder) -> model

def load_state_dict(source, folder):
    model = fresh()
    model.load_state_dict(source.state_dict(), strict=True)
    return model


def load_into_a_calibrated_one(source, folder):
    model = fresh()
    calibrate(model, images(16))
    model.load_state_dict(source.state_dict(), strict=True)
    return model


def load_into_a_converted_one(source, folder):
    model = convert_ann(fresh(), images(16), 2)
    model.load_state_dict(source.state_dict(), strict=True)
    return model


def load_by_equal_shapes(source, folder):
    model = fresh()
    own, state = model.state_dict(), source.state_dict()
    model.load_state_dict({k: v for k, v in state.items() if k in own and v.shape == own[k].shape}, strict=False)
    return model


def assign(source, folder):
    model = fresh()
    model.load_state_dict(copy.deepcopy(source.state_dict()), assign=True)
    return model


def meta_model():
    with torch.device('meta'):
        return convert_to_spiking(timm.create_model(NAME, **TINY))


def assign_to_meta(source, folder):
    model = meta_model()
    model.load_state_dict(copy.deepcopy(source.state_dict()), assign=True)
    return model


def empty_and_load(source, folder):
    model = nn.Sequential(meta_model()).to_empty(device='cpu')
    model.load_state_dict({f'0.{k}': v for k, v in source.state_dict().items()})
    return model[0]


def written_in_place(source, folder):
    model = fresh()
    with torch.no_grad():
        for own, value in zip(model.state_dict().values(), source.state_dict().values()):
            own.copy_(value)
    return model


def written_in_place_in_training(source, folder):
    model = written_in_place(source, folder).train()
    assert model.timesteps == source.timesteps
    return model


def accelerate_dispatch(source, folder):
    torch.save(source.state_dict(), folder / 'pytorch_model.bin')
    return accelerate.load_checkpoint_and_dispatch(meta_model(), str(folder / 'pytorch_model.bin'), {'': 'cpu'})


def accelerate_init_empty(source, folder):
    with accelerate.init_empty_weights(include_buffers=True):
        model = convert_to_spiking(timm.create_model(NAME, **TINY))
    accelerate.Accelerator(cpu=True).save_model(source, folder, max_shard_size='20KB')
    return accelerate.load_checkpoint_and_dispatch(model, str(folder), {'': 'cpu'})


def accelerate_in_model(source, folder):
    safetensors.torch.save_file(source.state_dict(), folder / 'model.safetensors')
    model = fresh()
    accelerate.load_checkpoint_in_model(model, str(folder / 'model.safetensors'))
    return model


def ema_of(cls, **kwargs):
    def ema(source, folder):
        averaged = cls(fresh(), decay=0., **kwargs)
        averaged.update(source)
        return averaged.module
    ema.__name__ = f'{cls.__name__}{"".join(kwargs)}'
    return ema


def average_of(name, **kwargs):
    def average(source, folder):
        averaged = AveragedModel(fresh(), **kwargs)
        for _ in range(3):
            averaged.update_parameters(source)
        return averaged.module
    average.__name__ = name
    return average


def deepcopied(source, folder):
    return copy.deepcopy(source)


def pickled(source, folder):
    return pickle.loads(pickle.dumps(source))


def saved_whole(source, folder):
    file = io.BytesIO()
    torch.save(source, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def safetensors_model(source, folder):
    safetensors.torch.save_model(source, folder / 'model.safetensors')
    model = fresh()
    safetensors.torch.load_model(model, folder / 'model.safetensors')
    return model


def saved(source, folder, **state):
    torch.save({'state_dict': source.state_dict(), **state}, folder / 'model.pth.tar')
    return str(folder / 'model.pth.tar')


def timm_load_checkpoint(source, folder):
    model = fresh()
    load_checkpoint(model, saved(source, folder))
    return model


def timm_load_ema(source, folder):
    model = fresh()
    load_checkpoint(model, saved(fresh(), folder, state_dict_ema=source.state_dict()), use_ema=True)
    return model


def timm_checkpoint_path(source, folder):
    return timm.create_model(f'spiking_{NAME}', checkpoint_path=saved(source, folder), **TINY)


def timm_pretrained(source, folder):
    overlay = dict(file=saved(source, folder), num_classes=K)
    return timm.create_model(f'spiking_{NAME}', pretrained=True, pretrained_cfg_overlay=overlay, **TINY)


def timm_hub_folder(source, folder):
    source.pretrained_cfg = dict(source.pretrained_cfg, architecture=f'spiking_{NAME}', num_classes=K)
    timm.models.save_for_hf(source, folder / 'hub', model_args={k: v for k, v in TINY.items() if k != 'num_classes'})
    return timm.create_model(f'local-dir:{folder / "hub"}', pretrained=True)


def averaged_checkpoints(source, folder):
    """As timm's avg_checkpoints.py: everything in float64, then float32."""
    state = {k: ((v.double() + v.double()) / 2).float() for k, v in source.state_dict().items()}
    model = fresh()
    model.load_state_dict(state)
    return model


def wrapped_in_ddp(source, folder):
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=0, world_size=1)
    try:
        ddp = nn.parallel.DistributedDataParallel(copy.deepcopy(source))
        ddp.train()(images())
        assert ddp.module.timesteps == source.timesteps
        model = fresh()
        model.load_state_dict(clean_state_dict(ddp.state_dict()))
        statistics = {k: v for k, v in source.state_dict().items() if 'running' in k or 'tracked' in k}
        model.load_state_dict(statistics, strict=False)  # those of the training step above
    finally:
        dist.destroy_process_group()
    return model


def of_a_compiled_model(source, folder):
    compiled = torch.compile(source, backend='eager')
    model = fresh()
    model.load_state_dict(clean_state_dict(compiled.state_dict()))
    return model


def into_a_compiled_model(source, folder):
    compiled = torch.compile(fresh(), backend='eager')
    compiled.load_state_dict({f'_orig_mod.{k}': v for k, v in source.state_dict().items()})
    return compiled._orig_mod


def moved(source, folder):
    model = copy.deepcopy(source).type(torch.float64).double().type(torch.float32)
    return model.share_memory()


WAYS = [
    load_state_dict, load_into_a_calibrated_one, load_into_a_converted_one, load_by_equal_shapes, assign,
    assign_to_meta, empty_and_load, written_in_place, written_in_place_in_training, accelerate_dispatch,
    accelerate_init_empty, accelerate_in_model,
    ema_of(ModelEmaV2), ema_of(ModelEmaV3), ema_of(ModelEmaV3, exclude_buffers=True),
    ema_of(ModelEmaV3, foreach=False), average_of('AveragedModel'),
    average_of('AveragedModel_buffers', use_buffers=True),
    average_of('AveragedModel_ema', use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(.5)), deepcopied, pickled,
    saved_whole, safetensors_model, timm_load_checkpoint, timm_load_ema, timm_checkpoint_path, timm_pretrained,
    timm_hub_folder, averaged_checkpoints, wrapped_in_ddp, of_a_compiled_model, into_a_compiled_model, moved]
# they write into, or compare with, one number where the source has one per channel
NEED_EQUAL_SHAPES = {
    'load_by_equal_shapes', 'written_in_place', 'written_in_place_in_training', 'accelerate_dispatch',
    'accelerate_init_empty', 'ModelEmaV2', 'ModelEmaV3', 'ModelEmaV3exclude_buffers',
    'ModelEmaV3foreach', 'AveragedModel', 'AveragedModel_buffers', 'AveragedModel_ema'}


@pytest.mark.parametrize('create', [plain, calibrated, converted], ids=lambda f: f.__name__)
@pytest.mark.parametrize('way', WAYS, ids=lambda f: f.__name__)
def test_same_numbers(way, create, tmp_path):
    source = create()
    assert not torch.equal(logits(source)[0], logits(source)[1])  # another T would be seen
    if create is converted and way.__name__ in NEED_EQUAL_SHAPES:
        with pytest.raises((RuntimeError, ValueError), match='per channel|shape|size'):
            logits(way(source, tmp_path))
        return
    model = way(source, tmp_path)
    same(model, source)
    again = fresh()
    again.load_state_dict(model.state_dict(), strict=True)  # what it hands on is whole
    same(again, source)


# ---- what the table's rows have beside equal numbers

def test_ann_loads_strictly_by_assignment_into_a_meta_model():
    source = ann()
    model = meta_model()
    result = model.load_state_dict(copy.deepcopy(source.state_dict()), strict=True, assign=True)
    assert not result.missing_keys and not result.unexpected_keys
    assert not [name for name, t in model.state_dict().items() if t.is_meta]
    same(model, convert_to_spiking(source))


def test_averaged_copy_made_before_the_calibration_follows_it():
    model = convert_to_spiking(ann(), **SETTINGS)
    ema, average = ModelEmaV3(model, decay=.5), AveragedModel(model)
    calibrate(model, images(16))
    ema.update(model)
    before, now = 1., {name: lif.gain for name, lif in model.neurons().items()}
    assert all(ema.module.neurons()[name].gain == pytest.approx((before + gain.item()) / 2, rel=1e-5)
               for name, gain in now.items())  # an average as of weights
    for _ in range(60):  # 2 ** -60 is below float32's resolution
        ema.update(model)
    torch.testing.assert_close(logits(ema.module), logits(model))
    average.update_parameters(model)
    same(average.module, model)


def foreach_average(decay):
    return lambda model: AveragedModel(model, use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(decay))


def scalar_average(decay):
    """As Lightning's EMAWeightAveraging."""
    return lambda model: AveragedModel(model, use_buffers=True, avg_fn=get_ema_avg_fn(decay))


def timm_average(decay):
    return lambda model: ModelEmaV2(model, decay=decay)


@pytest.mark.parametrize('decay', [.9, .99, .9999, .99999])
@pytest.mark.parametrize('average', [foreach_average, scalar_average, timm_average])
def test_averages_that_round_whole_numbers_keep_the_settings(average, decay):
    model = plain()
    averaged = average(decay)(model)
    for _ in range(20):
        (averaged.update if average is timm_average else averaged.update_parameters)(model)
    again = fresh()
    again.load_state_dict(averaged.module.state_dict())
    assert averaged.module.settings == again.settings == model.settings
    # decay * x + (1 - decay) * x is x but for the rounding of three operations
    torch.testing.assert_close(again.state_dict()['conv1.0.weight'], model.state_dict()['conv1.0.weight'], rtol=1e-5,
                               atol=0)


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('explicit', [False, True])
def test_set_timesteps_reaches_averaged_copies(explicit, training):
    model = convert_to_spiking(ann(), timesteps=3) if explicit else convert_to_spiking(ann())
    ema, average = ModelEmaV3(model, decay=0.), AveragedModel(model)
    if training:
        assert logits(ema.module).shape[0] == logits(average.module).shape[0] == model.timesteps
        ema.module.train()
    model.set_timesteps(5)
    for copy_, update in ((ema, ema.update), (average, average.update_parameters)):
        update(model)
        assert copy_.module.timesteps == 5 and copy_.module(images(), per_step=True).shape[0] == 5
        assert {lif.timesteps for lif in copy_.module.neurons().values()} == {5}
    ema.module.set_timesteps(2)  # a copy's own setting is its own
    assert logits(ema.module).shape[0] == 2 and model.timesteps == 5


def test_what_was_asked_for_stays_however_it_is_loaded(tmp_path, caplog):
    source = calibrated()
    torch.save(source.state_dict(), tmp_path / 'pytorch_model.bin')
    model = fresh(timesteps=2)
    with caplog.at_level(logging.WARNING, logger='timm_sscl'), torch.device('meta'):
        model = convert_to_spiking(timm.create_model(NAME, **TINY), timesteps=2)
    accelerate.load_checkpoint_and_dispatch(model, str(tmp_path / 'pytorch_model.bin'), {'': 'cpu'})
    assert logits(model).shape[0] == 2 and model.settings.tau == .5
    assert caplog.text.count('timesteps=2 was asked for and is kept') == 1
    again = fresh()
    again.load_state_dict(model.state_dict())  # which hands on what it ran
    assert again.timesteps == 2
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


def average_of_settings():
    """As an average over models that ran different T does, which take no part in rounding away."""
    models = [convert_to_spiking(ann(), timesteps=t) for t in (4, 8)]
    a, b = (model.state_dict() for model in models)
    return {k: ((a[k].double() + b[k].double()) / 2).to(a[k].dtype) for k in a}


def test_an_average_over_different_settings_is_refused():
    state = average_of_settings()
    with pytest.raises(RuntimeError, match='checksum.*different settings'):
        fresh().load_state_dict(state)
    model = fresh()
    with torch.no_grad():
        model.spiking_settings.copy_(state['spiking_settings'])
    for _ in range(2):
        with pytest.raises(RuntimeError, match='checksum.*different settings'):
            model(images())


def test_another_choice_of_neurons_past_load_state_dict_is_refused(tmp_path):
    source = convert_to_spiking(ann(), exclude=['layer4'])
    model = fresh()
    model.load_state_dict(source.state_dict())  # it converts again
    assert set(model.neurons()) == set(source.neurons())
    same(model, source)
    model = fresh()
    accelerate.utils.set_module_tensor_to_device(
        model, 'spiking_settings', 'cpu', source.state_dict()['spiking_settings'])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="exclude=\\('layer4',\\)"):
            model(images())


def test_gains_per_channel_that_a_selection_dropped_are_missed(tmp_path):
    source, model = converted(), fresh()
    before = copy.deepcopy(model.state_dict())
    own = model.state_dict()
    state = {k: v for k, v in source.state_dict().items() if k in own and v.shape == own[k].shape}
    with pytest.raises(RuntimeError, match='gains per channel.*load_state_dict'):
        model.load_state_dict(state, strict=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.load_spiking_state(source.state_dict())  # what the loader cannot give it
    model.load_state_dict(state, strict=False)
    same(model, source)
    model = meta_model()
    model.load_spiking_state(source.state_dict())
    torch.save(source.state_dict(), tmp_path / 'pytorch_model.bin')
    same(accelerate.load_checkpoint_and_dispatch(model, str(tmp_path / 'pytorch_model.bin'), {'': 'cpu'}), source)


def test_memory_without_values_holds_neither_gains_nor_settings():
    """to_empty may hand out the memory of another model's state."""
    model, source = nn.Sequential(calibrated()), ann()
    for t in model.state_dict().values():
        assert t.numel()
    model.to_empty(device='cpu')
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            assert name != '0.spiking_settings' or buffer.any()
    model[0].load_state_dict(source.state_dict())  # weights only
    assert all(lif.gain is None for lif in model[0].neurons().values())
    same(model[0], convert_to_spiking(source, **SETTINGS))


def test_gains_of_one_cost_no_multiplication():
    model = fresh()
    calibrate(model, images(16))
    assert all(lif.gain is not None for lif in model.neurons().values())
    model.load_state_dict(plain().state_dict())
    assert all(lif.gain is None and lif.scale is None for lif in model.neurons().values())


def _by_load_state_dict(model, state):
    model.load_state_dict(state)


def _by_data(model, state):
    for key, tensor in model.state_dict().items():
        tensor.data.copy_(state[key])


def _by_new_data(model, state):
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        tensor.data = state[key].clone()


def _by_numpy(model, state):
    for key, tensor in model.state_dict().items():
        tensor.numpy()[...] = state[key].numpy()


def _by_ema(model, state):
    ema = ModelEmaV3(model, decay=0.)
    ema.update(calibrated())
    model.__dict__['averaged'] = ema.module


@pytest.mark.parametrize('inference', [False, True])
@pytest.mark.parametrize('write', [_by_load_state_dict, _by_data, _by_new_data, _by_numpy, _by_ema])
def test_writes_that_torch_does_not_count(write, inference):
    """No version tells of what is written through .data, or into tensors that were made in inference mode."""
    source, x = calibrated().eval(), images()
    with torch.inference_mode(inference), torch.no_grad():
        expected, model = source(x), fresh().eval()
        before = model(x)  # it has read its own
        write(model, source.state_dict())
        model = model.__dict__.get('averaged', model)
        assert torch.equal(model(x), expected) and not torch.equal(before, expected)


def test_nothing_is_read_while_nobody_writes(monkeypatch):
    from timm_sscl.conversion import state
    from timm_sscl.neurons import factors
    model, reads = calibrated().train(), []
    for module in (state, factors):
        read = module.read_values
        monkeypatch.setattr(module, 'read_values', lambda t, read=read: reads.append(1) or read(t))
    optimizer, ema = torch.optim.SGD(model.parameters(), .1), ModelEmaV3(model)
    model(images())
    ema.update(model)  # the first one writes that there are gains
    reads.clear()
    for _ in range(3):
        model(images()).sum().backward()
        optimizer.step()
        ema.update(model)
        assert model.eval().timesteps == 3 and model.train().settings
    assert not reads


@torch.no_grad()
def test_functional_calls_and_export():
    """A call with other state than its own takes its settings and gains too, and leaves no trace."""
    source, model = calibrated(), plain()
    torch.testing.assert_close(
        torch.func.functional_call(model, source.state_dict(), (images(),)), source(images()), rtol=0, atol=0)
    same(model, plain())
    exported = torch.export.export(source, (images(),)).module()
    torch.testing.assert_close(exported(images()), source(images()))


class Shared(nn.Module):
    """One activation under two names."""

    def __init__(self):
        super().__init__()
        self.conv, self.act, self.fc = nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Linear(4, K)
        self.also = self.act

    def forward(self, x):
        return self.fc(self.also(self.act(self.conv(x))).mean((2, 3)))


def test_a_neuron_under_two_names_is_saved_once(tmp_path):
    torch.manual_seed(0)
    source = convert_to_spiking(Shared(), timesteps=2)
    calibrate(source, images(16))
    safetensors.torch.save_file(source.state_dict(), tmp_path / 'model.safetensors')
    model = convert_to_spiking(Shared())
    model.load_state_dict(safetensors.torch.load_file(tmp_path / 'model.safetensors'), strict=True)
    same(model, source)
    assert model.act is model.also


def test_settings_of_a_later_version_are_refused():
    from timm_sscl.conversion.settings import encode
    stored = {**plain().settings.stored(), 'coding': 'poisson'}
    state = {**plain().state_dict(), 'spiking_settings': torch.tensor(list(encode(stored)), dtype=torch.uint8)}
    with pytest.raises(RuntimeError, match="does not know: coding='poisson'"):
        fresh().load_state_dict(state)


def test_long_lists_of_patterns_fit_or_are_refused():
    source, model = nn.Sequential(*(nn.ReLU() for _ in range(400))), nn.Sequential(*(nn.ReLU() for _ in range(400)))
    convert_to_spiking(source, exclude=[f'{i}' for i in range(399)])
    state = source.state_dict()
    assert sum(map(len, source.settings.exclude)) < 4096 == len(state['spiking_settings'])
    convert_to_spiking(model).load_state_dict(state)
    assert list(model.neurons()) == ['399'] and model.settings == source.settings
    names = [str(i ** 40) for i in range(90)]  # too long to be stored in halves
    source, model = (nn.Sequential(OrderedDict((name, nn.ReLU()) for name in names)) for _ in range(2))
    convert_to_spiking(source, exclude=names[1:])
    convert_to_spiking(model).load_state_dict(source.state_dict())
    assert list(model.neurons()) == names[:1] and model.settings == source.settings
    model = ann()
    with pytest.raises(ValueError, match='include, exclude'):
        convert_to_spiking(model, exclude=[str(i ** 40) for i in range(200)])
    assert type(model) is timm.models.ResNet


def test_a_neuron_by_itself_keeps_its_gain():
    lif, other = LIF(2), LIF(2)
    assert not lif.state_dict()
    lif.set_gain(torch.rand(3, 1, 1))
    other.load_state_dict(lif.state_dict())
    x = torch.randn(4, 3, 5, 5)
    assert torch.equal(other(x), lif(x)) and not torch.equal(lif(x), LIF(2)(x))
