"""Run trials: teachers, rounds, worker processes, results, time limit."""
import fcntl
import gc
import math
import time
import traceback
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Dict, Hashable, List, Optional, Sequence, Set, Tuple

import torch

from timm_sscl.neurons import lif_backend

from trial_data import PAD, DeviceSet, load_device_set
from trial_graphs import Group, check_replay
from trial_models import State, as_arrays, initial_state, measure
from trial_precision import decided_precision
from trial_replica import Replica
from trial_results import append_line, claim, failed_line, machine_facts, ok_line
from trial_rounds import Round, rounds
from trial_teachers import Teachers
from trials import Trial, read_results

__all__ = ['Engine']

_MEASURED = 100  # validation images on which firing rates are measured
_AHEAD = 3  # rounds that are prepared while one trains


class Engine:
    """Train trials on one device and append their results to OUTPUT/runs.jsonl.

    Args:
        data: Folder of the images' .npz files.
        output: Folder of results and teachers.
        device: 'cpu' or 'cuda'.
        replicas: Trials that train side by side on CUDA.
        deadline: time.time() at which training must be over; a round that would not be done by then is not started.
        backend: How neurons run, see `lif_backend`.
        workers: Processes that prepare initial states and measure energy; 0 does it here.
        graph: Whether to capture steps on CUDA.
        precision: 'float32' or 'bfloat16' (CPU only, channels_last), or 'auto': the faster one of a step on this CPU,
            measured once for an output; float32 on CUDA.
        evaluations: Evaluations per trial, the last after the last epoch.
    """

    def __init__(
            self,
            data: Path,
            output: Path,
            device: str = 'cpu',
            replicas: int = 8,
            deadline: Optional[float] = None,
            backend: str = 'auto',
            workers: int = 0,
            graph: bool = True,
            precision: str = 'float32',
            evaluations: int = 4,
    ):
        self.data, self.output, self.device = data, output, torch.device(device)
        self.replicas, self.deadline, self.backend, self.graph = replicas, deadline, backend, graph
        self.sets: Dict[str, DeviceSet] = {}
        self.teachers = Teachers(output / 'teachers', self.images)
        self.groups: Tuple[Any, List[Group]] = (None, [])  # of the last round: its key, its groups
        self.seconds_per_step = 0.
        self.unwritten: List[Tuple[Future, Trial, Dict[str, Any]]] = []
        self.pool = ProcessPoolExecutor(
            workers, get_context('spawn'), initializer=torch.set_num_threads, initargs=(1,)) if workers else None
        self.checked = self.device.type != 'cuda' or not graph
        self.evaluations = evaluations
        self.set_precision('float32' if precision == 'auto' else precision)
        self.undecided = precision == 'auto' and self.device.type == 'cpu'
        output.mkdir(parents=True, exist_ok=True)
        if self.device.type == 'cuda':  # only there steps are compiled and captured
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = True  # as PyTorch does by default
            torch.backends.cudnn.benchmark = True  # the same shapes all the time
            torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs eagerly
            torch._dynamo.config.recompile_limit = 64  # one per shape of the features

    def close(self) -> None:
        """Write what is left and end the worker processes."""
        self.write(wait=True)
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    # ---- precision

    def set_precision(self, name: str) -> None:
        if name == 'bfloat16' and self.device.type != 'cpu':
            raise ValueError("precision='bfloat16' is for the CPU; on CUDA it must be float32 or auto.")
        self.precision, self.bfloat16 = name, name == 'bfloat16'
        self.facts = machine_facts(self.device, name)

    def decide_precision(self, trial: Trial) -> None:
        """Set the faster precision of a step of this trial's student, or the one that this output already has."""
        self.undecided = False
        alone = replace(trial, losses={}, loss_options={}, task_weight=1.)
        state = self.prepare(alone).result()

        def create(name: str) -> Replica:
            self.set_precision(name)
            replica = self.create(alone)
            replica.load(alone, state)
            return replica

        self.set_precision(decided_precision(self.output, self.facts['device'], create))

    # ---- parts of a trial

    def images(self, name: str) -> DeviceSet:
        """Return a set of images on the device."""
        if name not in self.sets:
            self.sets[name] = load_device_set(self.data, name, self.device)
        return self.sets[name]

    def create(self, trial: Trial) -> Replica:
        compiled = self.device.type == 'cuda' and self.backend != 'eager'
        return Replica(trial, self.images(trial.scale.data), self.teachers.load(trial, self.bfloat16),
                       compiled, self.bfloat16)

    def submit(self, function: Any, *args: Any) -> Future:
        """Run a function in a worker process, or now if there is none."""
        if self.pool is not None:
            return self.pool.submit(function, *args)
        future: Future = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:  # raised where the result is read
            future.set_exception(error)
        return future

    def prepare(self, trial: Trial) -> Future:
        """Return the future initial state of a trial."""
        data = self.images(trial.scale.data)
        images = data.normalise(data.train[:100, :, PAD:-PAD, PAD:-PAD]).cpu().numpy()
        return self.submit(initial_state, trial, data.classes, images, len(data.train))

    def measure(self, trial: Trial, replica: Replica) -> Future:
        """Return the future firing rate and energy of a trained student."""
        data = self.images(trial.scale.data)
        images = data.normalise(data.evaluated[trial.split][0][:_MEASURED]).cpu().numpy()
        return self.submit(measure, trial, data.classes, as_arrays(replica.task.student), images)

    # ---- teachers

    def train_teachers(self, trials: Sequence[Trial], wait: bool = True) -> None:
        """Train the teachers of these trials that are not there yet, one process after the other.

        Args:
            trials: The trials.
            wait: Whether to wait for a process that trains teachers; else leave it to that.
        """
        with open(self.output / 'teachers.lock', 'w') as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                return
            self.run_rounds(self.teachers.missing(trials))

    # ---- all trials

    def run(self, trials: Sequence[Trial], retry: bool = False) -> None:
        """Run trials that have no result yet.

        Args:
            trials: The trials, with unique names.
            retry: Whether to run failed trials again.
        """
        done = self._done(retry)
        left = [trial for trial in trials if trial.name not in done]
        print(f'{len(trials)} trials, {len(trials) - len(left)} of them done', flush=True)
        with lif_backend(self.backend):
            if self.undecided and left:
                self.decide_precision(left[0])
            self.train_teachers(left, wait=self.device.type == 'cuda')
            if self.device.type == 'cuda':
                self.check(left)
                self.run_rounds(left)
            else:
                self.run_claimed(left, retry)
        self.write(wait=True)

    def _done(self, retry: bool) -> Set[str]:
        """Return the names of the trials that are not run again."""
        return {line['name'] for line in read_results(self.output) if line['status'] == 'ok' or not retry}

    def run_claimed(self, trials: Sequence[Trial], retry: bool) -> None:
        """Run trials one after another until all are done or the time limit. Several processes may do so with one
        output: each takes the next trial that no other one has, and at the end waits for theirs.
        """
        left, began = list(trials), time.time()
        while left:
            before = len(left)
            for trial in list(left):
                with claim(self.output, trial.name) as free:
                    if not free:
                        continue
                    if trial.name not in self._done(retry):
                        if self._late(trial, len(left)):
                            return
                        self.train_teachers([trial])
                        self.run_rounds([trial], quiet=True)
                        self.write(wait=True)
                    left.remove(trial)
                self._progress(len(trials) - len(left), len(trials), began)
            if len(left) == before:
                time.sleep(1)

    def check(self, trials: Sequence[Trial]) -> None:
        """Check once a session, on CUDA, that replayed steps equal eager ones."""
        by_losses = {tuple(trial.losses): trial for trial in trials}
        chosen = sorted(by_losses.values(), key=lambda trial: 'sscl' not in trial.losses)[:2]
        if self.checked or not chosen:
            return
        chosen = [trial for trial in chosen if trial.scale == chosen[0].scale and trial.split == chosen[0].split]
        states = [self.prepare(trial).result() for trial in chosen]
        for name, difference in check_replay(self.create, chosen, states):
            print(f'replayed = eager within {difference:.1e}: {name}', flush=True)
        self.checked = True

    def run_rounds(self, trials: Sequence[Trial], quiet: bool = False) -> None:
        """Run all trials, prepared by the workers while others train, until the time limit."""
        planned = list(rounds(trials, self.replicas))
        ready: Dict[str, Future] = {}
        done, began = 0, time.time()
        for i, current in enumerate(planned):
            if self._late(current.trials[0], len(trials) - done):
                return
            for trial in (trial for ahead in planned[i:i + _AHEAD] for trial in ahead.trials):
                if trial.name not in ready:
                    ready[trial.name] = self.prepare(trial)
            self._run_round(current, [ready.pop(trial.name) for trial in current.trials])
            done += len(current.trials)
            if not quiet:
                self._progress(done, len(trials), began)
            self.write()

    def _progress(self, done: int, all_trials: int, began: float) -> None:
        rate = (time.time() - began) / done
        print(f'{datetime.now():%H:%M:%S} {done}/{all_trials} trials, {rate:.1f} s each, '
              f'ETA {timedelta(seconds=round(rate * (all_trials - done)))}', flush=True)

    def _late(self, trial: Trial, waiting: int) -> bool:
        """Return whether a round of such trials would not be done by the time limit, and say so."""
        if self.deadline is None or time.time() + self._estimate(trial) <= self.deadline:
            return False
        print(f'time limit: {waiting} trials are not started', flush=True)
        return True

    def _estimate(self, trial: Trial) -> float:
        """Return seconds that a round will take, from the last one's step; 0 before the first."""
        steps = trial.scale.epochs * (len(self.images(trial.scale.data).train) // trial.scale.batch_size)
        return 1.1 * steps * self.seconds_per_step + (10 if self.seconds_per_step else 0)

    def _fail(self, trial: Trial, error: BaseException) -> None:
        text = ' '.join(f'{type(error).__name__}: {error}'.split())[:500]
        print(f'{trial.name} failed: {text}', flush=True)
        append_line(self.output, failed_line(trial, self.facts, text))

    def write(self, wait: bool = False) -> None:
        """Write the lines whose firing rates and energy have been measured; all of them with wait."""
        for item in [item for item in self.unwritten if wait or item[0].done()]:
            future, trial, line = item
            self.unwritten.remove(item)
            try:
                line['firing_rate'], line['energy'] = future.result()
            except Exception as error:
                print(f'{trial.name}: no firing rate: {error}', flush=True)
            append_line(self.output, line)

    # ---- one round

    def _run_round(self, current: Round, futures: Sequence[Future]) -> None:
        states: List[State] = []
        good: List[Trial] = []
        keys = []
        for key, trial, future in zip(current.key, current.trials, futures):
            try:
                states.append(future.result())
                good.append(trial)
                keys.append(key)
            except Exception as error:
                self._fail(trial, error)
        if tuple(keys) != self.groups[0]:
            good, states, keys = self._build(good, states, keys)
        first = 0
        for group in self.groups[1]:
            n = len(group.replicas)
            try:
                self._train(group, good[first:first + n], states[first:first + n])
            except Exception as error:
                for trial in good[first:first + n]:
                    self._fail(trial, error)
            first += n

    def _build(self, trials: List[Trial], states: List[State], keys: List[Hashable]) -> Tuple[List, List, List]:
        """Create the groups of a round. Return trials, states and keys without those that cannot be created."""
        self.groups = (None, [])
        gc.collect()
        if self.device.type == 'cuda':
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        replicas, kept = [], []
        for i, trial in enumerate(trials):
            try:
                replicas.append(self.create(trial))
                kept.append(i)
            except Exception as error:
                self._fail(trial, error)
        self.groups = tuple(keys[i] for i in kept), self._groups(replicas)
        return [trials[i] for i in kept], [states[i] for i in kept], [keys[i] for i in kept]

    def _groups(self, replicas: List[Replica]) -> List[Group]:
        """Return one captured group of all replicas; where that is not possible, a group for each."""
        if not self.graph or self.device.type != 'cuda' or not replicas:
            return [Group([replica], graph=False) for replica in replicas]
        try:
            return [Group(replicas)]
        except Exception as error:
            print(f'not captured together: {type(error).__name__}: {error}', flush=True)
            traceback.print_exc()  # the reason comes before the error of the capture
        groups = []
        for replica in replicas:
            try:
                groups.append(Group([replica]))
            except Exception as error:
                print(f'{replica.trial.name} is not captured, its steps run eagerly: {error}', flush=True)
                groups.append(Group([replica], graph=False))
        return groups

    def _train(self, group: Group, trials: Sequence[Trial], states: Sequence[State]) -> None:
        """Train a group to the end and collect the results."""
        clock = time.perf_counter if self.device.type == 'cuda' else time.process_time  # a CPU has other work, too
        epochs, began, training, working = trials[0].scale.epochs, time.perf_counter(), 0., 0.
        group.load(trials, states)
        history: List[List[Tuple[int, float]]] = [[] for _ in trials]
        layers: List[Dict[str, Any]] = [{} for _ in trials]
        for epoch in range(epochs):
            start, own = time.perf_counter(), clock()
            group.train_epoch(epoch)
            group.synchronize()
            training += time.perf_counter() - start
            working += clock() - own
            for name in ('first',) * (epoch == 0) + ('last',) * (epoch == epochs - 1):
                for replica, values in zip(group.replicas, layers):
                    values[name] = replica.task.stats
            if (epoch + 1) % max(1, math.ceil(epochs / self.evaluations)) == 0 or epoch == epochs - 1:
                group.evaluate()
                for replica, values in zip(group.replicas, history):
                    values.append((epoch + 1, replica.evaluation()[0]))
        steps = epochs * group.replicas[0].steps
        self.seconds_per_step = training / steps
        memory = torch.cuda.max_memory_allocated() / 2 ** 20 if self.device.type == 'cuda' else None
        shared = dict(
            seconds=time.perf_counter() - began, replicas=len(trials), ms_per_step=1e3 * working / steps,
            peak_memory=memory, graph=group.captured)
        for replica, trial, points, values in zip(group.replicas, trials, history, layers):
            self._finish(replica, trial, top1_epochs=points, layers=values if values['last'] else {}, **shared)

    def _finish(self, replica: Replica, trial: Trial, **numbers: Any) -> None:
        """Collect a trained replica's numbers; its line is written when firing rates and energy are known."""
        means = replica.means()
        top1, loss, correct = replica.evaluation()
        if not all(map(math.isfinite, [*means.values(), loss])):
            self._fail(trial, FloatingPointError(f'loss is not finite: {means}, validation {loss}'))
            return
        train_loss = means.pop('loss')
        if trial.timesteps == 0:
            self.teachers.save(trial, replica.task.student)
        line = ok_line(
            trial, self.facts, correct, top1=top1, val_loss=loss, train_loss=train_loss, train_terms=means,
            firing_rate=None, energy=None, teacher_top1=self.teachers.top1(trial, self.bfloat16),
            **numbers)
        self.unwritten.append((self.measure(trial, replica), trial, line))
