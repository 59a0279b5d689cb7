"""SSCLLoss in a LightningModule: checkpoints, resuming, validation, averaged weights. Needs the extra `examples`."""
import logging
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import timm_sscl  # noqa: F401, registers the spiking_ names with timm
from timm_sscl import SSCLLoss

L = pytest.importorskip('lightning')
callbacks = pytest.importorskip('lightning.pytorch.callbacks')

DECAY = .9  # at which an average of whole numbers is rounded


class Distilled(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        kwargs = dict(num_classes=4, channels=(8, 8, 8, 8), stem_width=4)
        self.model = timm.create_model('spiking_test_resnet', timesteps=2, v_threshold=.2, **kwargs)
        self.sscl = SSCLLoss(self.model, timm.create_model('test_resnet', **kwargs), input_size=(3, 32, 32), dim=8,
                             queue_size=16)
        self.validated = []

    def training_step(self, batch, index):
        loss = F.cross_entropy(self.model(batch[0]), batch[1]) + self.sscl(batch[0])
        self.log_dict({layer: values['cka'] for layer, values in self.sscl.device_stats.items()})
        return loss

    def validation_step(self, batch, index):
        with self.sscl.record_in_eval():
            self.model(batch[0])
            self.validated.append(self.sscl(batch[0]).item())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class States(callbacks.Callback):
    """Every state after an optimizer step."""

    def __init__(self):
        self.states = []

    def on_train_batch_end(self, trainer, module, *args):
        self.states.append({k: v.clone() for k, v in module.state_dict().items()})


def _loader():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(24, 3, 32, 32, generator=generator), torch.randint(4, (24,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8)


def _fit(module, folder, epochs, averaged=True, **kwargs):
    states = States()
    saved = callbacks.ModelCheckpoint(folder, filename='{epoch}', save_top_k=-1)
    average = [callbacks.EMAWeightAveraging(decay=DECAY)] if averaged else []
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # Lightning's own, of loader workers and the like
        trainer = L.Trainer(accelerator='cpu', max_epochs=epochs, logger=False, enable_progress_bar=False,
                            enable_model_summary=False, callbacks=[states, *average, saved])
        trainer.fit(module, _loader(), _loader(), **kwargs)
    return states.states


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run of two epochs: its module, the states after its steps, and its folder."""
    logging.getLogger('lightning.pytorch').setLevel(logging.ERROR)
    folder, module = tmp_path_factory.mktemp('lightning'), Distilled()
    return module, _fit(module, folder, 2), folder


def _checkpoint(folder, epoch):
    return torch.load(folder / f'epoch={epoch}.ckpt', weights_only=True)


def test_a_checkpoint_has_the_student_and_the_projections_and_no_teacher(run):
    module, _, folder = run
    checkpoint = _checkpoint(folder, 1)
    expected = {f'model.{k}' for k in module.model.state_dict()} | {f'sscl.{k}' for k in module.sscl.state_dict()}
    assert set(checkpoint['state_dict']) == expected
    trained = [*module.model.parameters(), *module.sscl.parameters()]
    assert len(checkpoint['optimizer_states'][0]['state']) == len(trained)


def test_averaged_weights_are_the_running_mean_of_the_steps(run):
    _, states, folder = run
    averaged = _checkpoint(folder, 1)['state_dict']
    expected = {k: v.double() for k, v in states[0].items()}
    for state in states[1:]:
        expected = {k: DECAY * v + (1 - DECAY) * state[k].double() for k, v in expected.items()}
    for name, value in averaged.items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-4, atol=1e-5, msg=name)
    student = timm.create_model('spiking_test_resnet', num_classes=4, channels=(8, 8, 8, 8), stem_width=4)
    student.load_state_dict({k[6:]: v for k, v in averaged.items() if k.startswith('model.')})
    assert student.timesteps == 2 and student.settings.v_threshold == .2


def test_validation_before_and_during_training_leaves_no_trace(run):
    module, states, _ = run
    assert len(module.validated) == 2 + 2 * 3  # Lightning's sanity check, then two epochs
    assert all(value == value for value in module.validated)
    assert states[0]['sscl.criterion.running_cka.0.mean_weight'] == pytest.approx(.1)  # of one training step
    assert states[0]['sscl.criterion.critic.queue_filled'] == 8


@pytest.mark.parametrize('averaged', [False, True])
def test_a_resumed_run_ends_as_the_uninterrupted_one(averaged, run, tmp_path):
    module, _, folder = run
    if not averaged:
        folder, module = tmp_path, Distilled()
        _fit(module, folder, 2, averaged=False)
    resumed = Distilled()
    _fit(resumed, tmp_path / 'resumed', 2, averaged, ckpt_path=folder / 'epoch=0.ckpt')
    for (name, one), other in zip(module.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(one, other), name
