"""Run replicas side by side: on CUDA as parallel branches of one captured graph, else one after another."""
import logging
import time
from typing import Callable, Dict, List, Sequence, Tuple

import torch

from trial_models import State
from trial_replica import Replica
from trials import Trial

__all__ = ['Group', 'check_replay']

_logger = logging.getLogger(__name__)
_WARMUP_STEPS = 3  # before the capture: lazily created state, workspaces, compiled kernels


class Group:
    """Replicas that train side by side. They have equal numbers of steps and of evaluation steps.

    On CUDA, a step of all replicas is captured once, each replica on its own stream, and then replayed. What cannot be
    captured runs eagerly, and says so.

    Args:
        replicas: The replicas. The capture trains them a few steps; load their trials afterwards.
        graph: Whether to capture; on CUDA only.
    """

    def __init__(self, replicas: Sequence[Replica], graph: bool = True):
        self.replicas = list(replicas)
        self.device = self.replicas[0].rate.device
        self._streams: List[torch.cuda.Stream] = []
        self._train: Callable[[], None] = self._eager_train
        self._evaluate: Callable[[], None] = self._eager_evaluate
        self.captured = False
        if graph and self.device.type == 'cuda':
            self.capture()

    # ---- eager

    def _eager_train(self) -> None:
        for replica in self.replicas:
            replica.train_step()

    def _eager_evaluate(self) -> None:
        for replica in self.replicas:
            replica.eval_step()

    # ---- captured

    def capture(self) -> None:
        """Capture a training step and an evaluation step, after steps that create what is created lazily. The trials'
        tensors are no longer initial then.
        """
        self._streams = [torch.cuda.Stream(self.device) for _ in self.replicas]
        for train in (True, False):
            for replica, stream in zip(self.replicas, self._streams):
                replica.train_mode(train)
                replica.begin_epoch(0)
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    for _ in range(_WARMUP_STEPS if train else 1):
                        replica.rewind()
                        replica.train_step() if train else replica.eval_step()
                    replica.rewind()
                    if train:
                        replica.optimizer.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            graph = self.record(train)
            if train:
                self._train = graph.replay
            else:
                self._evaluate = graph.replay
        self.captured = True

    def record(self, train: bool) -> torch.cuda.CUDAGraph:
        """Capture one step of all replicas, each on its stream between a common start and a common end."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            main = torch.cuda.current_stream()
            for replica, stream in zip(self.replicas, self._streams):
                stream.wait_stream(main)
                with torch.cuda.stream(stream):
                    replica.train_step() if train else replica.eval_step()
            for stream in self._streams:
                main.wait_stream(stream)
        torch.cuda.synchronize()
        return graph

    # ---- use

    def load(self, trials: Sequence[Trial], states: Sequence[State]) -> None:
        """Begin these trials, one per replica."""
        for replica, trial, state in zip(self.replicas, trials, states):
            replica.load(trial, state)

    def train_epoch(self, epoch: int) -> None:
        """Train all replicas for an epoch, counted from 0."""
        for replica in self.replicas:
            replica.train_mode(True)
            replica.begin_epoch(epoch)
        for _ in range(self.replicas[0].steps):
            self._train()

    def evaluate(self) -> None:
        """Evaluate all replicas on their images; read the result by `Replica.evaluation`."""
        for replica in self.replicas:
            replica.train_mode(False)
            replica.position.zero_()
        for _ in range(max(replica.eval_steps for replica in self.replicas)):
            self._evaluate()

    def train_steps(self, steps: int) -> List[Dict[str, float]]:
        """Train some steps of the epoch; return the terms of every replica, averaged over its steps so far."""
        for replica in self.replicas:
            replica.train_mode(True)
        for _ in range(steps):
            self._train()
        return [replica.means() for replica in self.replicas]

    def time_step(self, steps: int = 20) -> float:
        """Return milliseconds of one training step of the whole group. There must be so many in an epoch."""
        for timed in (min(3, steps), steps):
            for replica in self.replicas:
                replica.rewind()
            self.synchronize()
            began = time.perf_counter()
            self.train_steps(timed)
            self.synchronize()
        return 1e3 * (time.perf_counter() - began) / steps

    def synchronize(self) -> None:
        if self.device.type == 'cuda':
            torch.cuda.synchronize()


def check_replay(
        create: Callable[[Trial], Replica],
        trials: Sequence[Trial],
        states: Sequence[State],
        steps: int = 5,
        tolerance: float = 1e-3,
) -> List[Tuple[str, float]]:
    """Check that replayed steps give the losses of eager ones, and that trials side by side don't touch each other.

    Each trial is trained eagerly and alone, twice, in a fresh replica; then all are in one group, also twice, since a
    second trial must not see the first one's state. The two eager runs show how far rounding goes: it differs where the
    library adds in another order, and a spike may flip by it.

    Args:
        create: Create a replica.
        trials: One per replica.
        states: Their initial states.
        steps: Steps of the first epoch.
        tolerance: Largest relative difference of a term, or ten times that of the eager runs if this is more. A step
            that is skipped, counted twice or not undone changes a term by more.

    Returns:
        Largest relative difference per trial.

    Raises:
        RuntimeError: A term differs by more.
    """
    expected, rounding = [], []
    for trial, state in zip(trials, states):
        runs = []
        for _ in range(2):
            alone = Group([create(trial)], graph=False)
            alone.load([trial], [state])
            runs += alone.train_steps(steps)
        expected.append(runs[0])
        rounding.append(_difference(runs[1], runs[0]))
    group = Group([create(trial) for trial in trials])
    found = []
    for _ in range(2):
        group.load(trials, states)
        for trial, ours, eager, noise in zip(trials, group.train_steps(steps), expected, rounding):
            difference = _difference(ours, eager)
            found.append((trial.name, difference))
            if not difference <= max(tolerance, 10 * noise):
                raise RuntimeError(f'{trial.name}: replayed losses {ours} differ from eager ones {eager} by '
                                   f'{difference:.2g} (eager ones by {noise:.2g}); the graph cannot be trusted.')
    return found


def _difference(ours: Dict[str, float], theirs: Dict[str, float]) -> float:
    """Return the largest relative difference of two sets of terms."""
    return max(abs(ours[name] - theirs[name]) / max(abs(theirs[name]), 1e-6) for name in theirs)
