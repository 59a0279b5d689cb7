#!/usr/bin/env python3
"""Time the steps of benchmarks/trials.py on a GPU: how many trials side by side, compiled neurons, cuDNN's choices.

    python benchmarks/trial_speed.py --data FOLDER --output DIR [--minutes 1] [--plan benchmarks/plans/zoo.yaml]

First it checks that replayed steps give the losses of eager ones. Then it prints milliseconds per step and trial of
each way, the most important first, until the time limit, and writes speed.json. With plans, it also times a step of
each of their arms alone, with its memory.
"""
import argparse
import gc
import json
import time
import traceback
from pathlib import Path
from typing import Any, Callable, Dict, List

import torch

from timm_sscl.neurons import lif_backend

from compare_plan import ComparisonPlan, merged
from trial_engine import Engine
from trial_graphs import Group, check_replay
from trial_models import teacher_model
from trial_replica import Replica
from trial_teachers import teacher_trial
from trials import Scale, Trial

ARMS: Dict[str, Dict[str, Any]] = {
    'ce': {}, 'sscl': dict(losses={'sscl': .1}), 'kd_step': dict(losses={'kd_step': .2}),
    'combined': dict(losses={'sscl': .1, 'kd_step': .2}, step_ce=True),
}


class Speed:
    """Measurements on one device; each adds a row and prints it."""

    def __init__(self, engine: Engine, scale: Scale, deadline: float):
        self.engine, self.scale, self.deadline = engine, scale, deadline
        self.rows: List[Dict[str, Any]] = []
        self.replicas: List[Replica] = []

    def trial(self, arm: str, seed: int = 1, **fields: Any) -> Trial:
        return Trial('speed', 'speed', arm, seed, 2, self.scale, **{**ARMS[arm], **fields})

    def untrained_teacher(self, trial: Trial) -> None:
        """Store an ANN with random weights as the trial's teacher; its values don't change the speed."""
        torch.manual_seed(0)
        model = teacher_model(trial, self.engine.images(self.scale.data).classes)
        self.engine.teachers.save(teacher_trial(trial), model)

    def check(self) -> None:
        trials = [self.trial('sscl'), self.trial('combined')]
        states = [self.engine.prepare(trial).result() for trial in trials]
        for name, difference in check_replay(self.engine.create, trials, states):
            print(f'replayed = eager within {difference:.1e}: {name}', flush=True)

    def create(self, count: int) -> None:
        """Have at least this many replicas, of all arms in turn."""
        arms = list(ARMS)
        while len(self.replicas) < count:
            trial = self.trial(arms[len(self.replicas) % len(arms)])
            replica = self.engine.create(trial)
            replica.load(trial, self.engine.prepare(trial).result())
            self.replicas.append(replica)

    def measure(self, name: str, count: int, backend: str = 'eager', graph: bool = True) -> None:
        """Time a step of the first `count` replicas side by side."""
        def replicas() -> List[Replica]:
            self.create(count)
            return self.replicas[:count]

        self._measure(name, count, replicas, backend, graph)

    def measure_arm(self, plan: ComparisonPlan, arm: str, backend: str) -> None:
        """Time a step of a plan's arm alone."""
        fields = {key: value for key, value in plan.arms[arm].items() if key in Trial.__dataclass_fields__}
        trial = Trial(plan='speed', phase='speed', arm=arm, seed=1, scale=self.scale,
                      **merged(plan.content.get('defaults', {}), fields))

        def replicas() -> List[Replica]:
            self.untrained_teacher(trial)
            replica = self.engine.create(trial)
            replica.load(trial, self.engine.prepare(trial).result())
            return [replica]

        self._measure(f'{plan.name}/{arm}', 1, replicas, backend, True)

    def _measure(
            self, name: str, count: int, create: Callable[[], List[Replica]], backend: str, graph: bool) -> None:
        if time.time() > self.deadline:
            print(f'{name}: no time left', flush=True)
            return
        began = time.perf_counter()
        if self.on_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        try:
            with lif_backend('eager'):  # compiling for the first state on the CPU would take a minute
                replicas = create()
            with lif_backend(backend):
                group = Group(replicas, graph)
                ready = time.perf_counter() - began
                ms = group.time_step(20 if graph else 3)
                start = time.perf_counter()
                group.evaluate()
                group.synchronize()
            row = dict(name=name, trials=count, ms_per_step=ms, ms_per_trial=ms / count, ready_seconds=ready,
                       evaluate_seconds=time.perf_counter() - start,
                       memory_mib=(torch.cuda.max_memory_allocated() - before) / 2 ** 20 if self.on_cuda else None)
        except Exception as error:
            traceback.print_exc()
            row = dict(name=name, trials=count, error=f'{type(error).__name__}: {error}'[:300])
        self.rows.append(row)
        print(' '.join(f'{key}={value:.2f}' if isinstance(value, float) else f'{key}={value}'
                       for key, value in row.items()), flush=True)
        gc.collect()

    @property
    def on_cuda(self) -> bool:
        return self.engine.device.type == 'cuda'

    def profile(self) -> None:
        """Print the kernels of one eager step that take longest."""
        from torch.profiler import ProfilerActivity, profile
        with lif_backend('eager'):
            self.create(2)
            group = Group(self.replicas[1:2], graph=False)
            group.time_step(1)
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA][:1 + self.on_cuda]) as record:
                group.time_step(1)
        key = 'self_cuda_time_total' if self.on_cuda else 'self_cpu_time_total'
        print(record.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60), flush=True)


def _with(flag: Any, name: str, value: Any, run: Callable[[], None]) -> None:
    before = getattr(flag, name)
    setattr(flag, name, value)
    try:
        run()
    finally:
        setattr(flag, name, before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, required=True, help='folder of the images')
    parser.add_argument('--output', type=Path, required=True, help='folder of speed.json')
    parser.add_argument('--set', default='20x250', help='set of images')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--minutes', type=float, default=1., help='no measurement is started later')
    parser.add_argument('--width', type=int, default=16, help='channels of the first stage')
    parser.add_argument('--plan', type=Path, nargs='*', default=[], help='plans whose arms are timed alone')
    parser.add_argument('--backend', default='eager', help='how neurons of these arms run')
    parser.add_argument('--profile', action='store_true', help='print the kernels that take longest')
    args = parser.parse_args()
    deadline = time.time() + 60 * args.minutes
    engine = Engine(args.data, args.output, args.device)
    classes = engine.images(args.set).classes
    speed = Speed(engine, Scale(args.set, args.set, classes, args.width), deadline)
    print(engine.facts, flush=True)
    speed.untrained_teacher(speed.trial('sscl'))
    with lif_backend('eager'):
        speed.check()
    speed.measure('eager neurons', 8)
    speed.measure('alone', 1)
    speed.measure('compiled neurons', 8, backend='auto')
    speed.measure('16 trials', 16)
    _with(torch.backends.cudnn, 'benchmark', True, lambda: speed.measure('cuDNN benchmark', 8))
    _with(torch.backends.cudnn, 'allow_tf32', False, lambda: speed.measure('no TF32', 8))
    speed.measure('no graph', 1, graph=False)
    for plan in map(ComparisonPlan, args.plan):
        for arm in plan.arms:
            speed.measure_arm(plan, arm, args.backend)
    if args.profile:
        speed.profile()
    (args.output / 'speed.json').write_text(json.dumps(dict(facts=engine.facts, rows=speed.rows), indent=1) + '\n')


if __name__ == '__main__':
    main()
