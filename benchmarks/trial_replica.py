"""One trial in training: its network, losses, optimizer and buffers on the device. A step changes them in place only,
so that it can be captured in a CUDA graph, and another seed of the same settings can take the place of the trial.
"""
from collections import OrderedDict
from dataclasses import asdict
from functools import partial
from typing import Any, Dict, Hashable, List, Mapping, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

import timm_sscl
from timm_sscl.losses.cka import RunningCKA
from timm_sscl.neurons.factors import FACTORS

from trial_data import DeviceSet, EpochBuffers
from trial_models import State, create_student, create_task, named_tensors
from trials import Trial

__all__ = ['Replica', 'learning_rates', 'signature']

STUDENT = dict(opt='adamw', lr=2e-3, weight_decay=0.02)
TEACHER = dict(opt='sgd', lr=0.1, weight_decay=5e-4, momentum=0.9)
WARMUP_EPOCHS = 1


def signature(trial: Trial) -> Hashable:
    """Return what trials share that can train in one another's place: everything but names and seed."""
    fields = asdict(trial)
    for name in ('plan', 'phase', 'arm', 'seed', 'config'):
        del fields[name]
    return repr(sorted(fields.items()))


def learning_rates(options: Mapping[str, Any], epochs: int, steps: int) -> List[float]:
    """Return the learning rate of every update: timm's cosine schedule after a warm-up of one epoch.

    Args:
        options: Options of the optimizer.
        epochs: Epochs.
        steps: Updates per epoch.
    """
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=options['lr'])
    warmup = min(WARMUP_EPOCHS, epochs - 1)
    schedule, _ = create_scheduler_v2(
        optimizer, sched='cosine', num_epochs=epochs, warmup_epochs=warmup, min_lr=0., warmup_lr=options['lr'] * 1e-2,
        step_on_epochs=False, updates_per_epoch=steps)
    rates = []
    for update in range(epochs * steps):
        schedule.step_update(update)
        rates.append(optimizer.param_groups[0]['lr'])
    return rates


class Replica:
    """A trial's training on one device.

    Args:
        trial: The trial, or any other of the same `signature`.
        data: Its images.
        teacher: Trained teacher on the device; None without.
        compiled: Whether to compile the running CKA, which otherwise is two hundred small kernels per layer.
        bfloat16: Whether forwards run in bfloat16 where autocast does so, in channels_last; else float32. The teacher
            must be channels_last, too.
    """

    def __init__(
            self,
            trial: Trial,
            data: DeviceSet,
            teacher: Optional[nn.Module],
            compiled: bool = False,
            bfloat16: bool = False,
    ):
        self.trial, self.data = trial, data
        device = data.train.device
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=bfloat16)
        self.memory_format = torch.channels_last if bfloat16 else torch.contiguous_format
        student = create_student(trial, data.classes)
        if trial.timesteps:
            timm_sscl.calibrate(student, torch.randn(4, 3, data.size, data.size))  # `load` sets the gains
        student = student.to(device, memory_format=torch.channels_last) if bfloat16 else student.to(device)
        self.task = create_task(trial, student, teacher, data.size, device, len(data.train))
        for module in self.task.modules():
            if compiled and isinstance(module, RunningCKA):
                module.compile(dynamic=False)
        self.steps = len(data.train) // trial.scale.batch_size
        self.epoch_buffers = EpochBuffers(data, self.steps, trial.scale.batch_size)
        self.tensors = named_tensors(self.task.trainable_module)
        self._ones = [name for name, tensor in self.tensors.items()
                      if name.endswith(tuple(FACTORS.values())) and (tensor == 1).all()]
        self._create_optimizer(device)
        self.update = torch.zeros(1, dtype=torch.int64, device=device)
        terms = ['loss', 'task', *self.task.weights]
        self.sums = OrderedDict((name, torch.zeros((), device=device)) for name in terms)
        self.images, self.targets = data.evaluated[trial.split]
        self.position = torch.zeros((), dtype=torch.int64, device=device)
        self.correct = torch.zeros(len(self.targets), dtype=torch.uint8, device=device)
        self.losses = torch.zeros(len(self.targets), device=device)
        self._window = torch.arange(data.eval_batch, device=device)

    def _create_optimizer(self, device: torch.device) -> None:
        options = {**(STUDENT if self.trial.timesteps else TEACHER), **self.trial.optimizer}
        if options['opt'] not in ('adamw', 'sgd'):
            raise ValueError(f"opt='{options['opt']}': must be adamw or sgd, whose state starts at zero.")
        fast: Dict[str, Any] = {}
        if device.type == 'cuda':  # a rate on the device, in a graph; SGD has no setting for it
            fast = dict(fused=True, capturable=True) if options['opt'] == 'adamw' else dict(fused=True)
        self.optimizer = create_optimizer_v2(self.task.trainable_module, **options, **fast)
        table = learning_rates(options, self.trial.scale.epochs, self.steps)
        self.rates = torch.tensor(table, device=device)
        self.rate = torch.zeros((), device=device)
        self._float_rates = table if device.type == 'cpu' else None
        if device.type == 'cuda':
            for group in self.optimizer.param_groups:
                group['lr'] = self.rate  # written by every step

    # ---- training

    def load(self, trial: Trial, state: State) -> None:
        """Begin a trial: set all tensors, in place.

        Args:
            trial: Trial of this replica's signature.
            state: Result of `initial_state`.

        Raises:
            ValueError: The state is not that of this network and its losses.
        """
        if set(state) != set(self.tensors):
            raise ValueError(f'{trial.name}: the state has other tensors than the replica: '
                             f'{", ".join(sorted(set(state) ^ set(self.tensors))[:4])}.')
        ones = {name for name in self._ones if (state[name] != 1).any()}
        if ones:
            raise ValueError(f'{trial.name}: {sorted(ones)[0]} is not 1, but was when the steps were captured, which '
                             f'leave out a multiplication by 1.')
        self.trial = trial
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(torch.from_numpy(state[name]))
            for values in self.optimizer.state.values():
                for value in values.values():
                    if isinstance(value, torch.Tensor):
                        value.zero_()
            self.update.zero_()
            self.rate.copy_(self.rates[0])
        self.begin_epoch(0)

    def begin_epoch(self, epoch: int) -> None:
        """Set the images of an epoch, and what depends on the progress of the training."""
        self.epoch_buffers.fill(self.trial.seed, epoch)
        progress = epoch / self.trial.scale.epochs
        self.task.set_progress(progress)
        for module in self.task.student.modules():
            if isinstance(module, timm_sscl.SpikingNeuron):
                module.set_progress(progress)
        for total in self.sums.values():
            total.zero_()

    def rewind(self) -> None:
        """Go to the first step, the first update and the first image to evaluate, without changing anything else."""
        for index in (self.epoch_buffers.step, self.update, self.position):
            index.zero_()

    def train_step(self) -> None:
        """Train on one batch, without waiting for the device."""
        index = self.epoch_buffers.index
        images, targets = self.epoch_buffers.next(self.trial.timesteps == 0 and self.trial.teacher == 'strong')
        self.rate.copy_(self.rates.index_select(0, self.update)[0])
        if self._float_rates is not None:
            for group in self.optimizer.param_groups:
                group['lr'] = self._float_rates[int(self.update)]
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            result = self.task(images.contiguous(memory_format=self.memory_format), targets, index=index)
        result['loss'].backward()
        self.optimizer.step()
        with torch.no_grad():
            for name, total in self.sums.items():
                key = 'loss' if name == 'loss' else f'{name}_loss'
                total.add_(result[key].detach())
            self.update.add_(1)

    def train_mode(self, mode: bool) -> None:
        self.task.train(mode)

    # ---- evaluation

    @property
    def eval_steps(self) -> int:
        return len(self.targets) // self.data.eval_batch

    @torch.no_grad()
    def eval_step(self) -> None:
        """Evaluate the next batch. `position` is the first image of it."""
        index = self._window + self.position
        targets = self.targets.index_select(0, index)
        images = self.data.normalise(self.images.index_select(0, index))
        with self.autocast():
            logits = self.task.student(images.contiguous(memory_format=self.memory_format)).float()
        self.correct.index_copy_(0, index, (logits.argmax(1) == targets).to(torch.uint8))
        self.losses.index_copy_(0, index, F.cross_entropy(logits, targets, reduction='none'))
        self.position.add_(self.data.eval_batch)

    def evaluation(self) -> Tuple[float, float, Any]:
        """Return top-1 in percent, cross-entropy, and which images were right, of the last evaluation."""
        n = self.data.sizes[self.trial.split]
        correct = self.correct[:n].cpu().numpy().astype(bool)
        return 100 * float(correct.mean()), float(self.losses[:n].mean()), correct

    # ---- results

    def means(self) -> Dict[str, float]:
        """Return the mean of every term over the steps of the epoch so far."""
        done = max(int(self.epoch_buffers.step), 1)
        values = torch.stack([total.float() for total in self.sums.values()]).tolist()
        return {name: value / done for name, value in zip(self.sums, values)}
