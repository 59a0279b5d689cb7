#!/usr/bin/env python3
"""Time and memory of a training step of every arm of a plan, each alone, in turn on one device.

    python benchmarks/trial_costs.py --plan benchmarks/plans/zoo.yaml --data DATA [--rounds 7] [--threads 1]

The trials of a comparison train side by side, which says nothing about one arm's costs. Here all arms take steps in
turn, round by round, so that other work on the machine disturbs all alike. Memory is that of the tensors that are kept
for the backward. Results go to benchmarks/results/compare_PLAN_costs.csv, and compare_results.py writes them to the
page.
"""
import argparse
import csv
from pathlib import Path
from typing import Any, Dict, List

import torch

from timm_sscl.neurons import lif_backend

from compare_data import costs_file
from compare_plan import ComparisonPlan, merged
from harness import RESULTS, interleave
from trial_engine import Engine
from trial_graphs import Group
from trial_models import teacher_model
from trial_replica import Replica
from trials import Trial

__all__ = ['kept_for_backward', 'measure_costs']

STEPS = 2  # per arm and round


def kept_for_backward(replica: Replica) -> float:
    """Return MiB of the tensors that a training step keeps for its backward, parameters and buffers left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in replica.tensors.values()}
    kept: Dict[int, int] = {}
    packed: List[torch.Tensor] = []  # held, so that no address is used twice

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            packed.append(x)
        return x

    replica.rewind()
    images, targets = replica.epoch_buffers.next()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        replica.task(images, targets)
    return sum(kept.values()) / 2 ** 20


def _replica(engine: Engine, plan: ComparisonPlan, arm: str) -> Replica:
    """Return an arm's replica at its first step, with an untrained teacher: its values cost the same."""
    fields = {key: value for key, value in plan.arms[arm].items() if key in Trial.__dataclass_fields__}
    trial = Trial(plan=plan.name, phase='costs', arm=arm, seed=1, scale=next(iter(plan.scales.values())),
                  **merged(plan.content.get('defaults', {}), fields))
    data = engine.images(trial.scale.data)
    teacher = teacher_model(trial, data.classes).to(engine.device) if trial.losses else None
    replica = Replica(trial, data, teacher)
    replica.load(trial, engine.prepare(trial).result())
    replica.train_mode(True)
    return replica


def measure_costs(plan: ComparisonPlan, engine: Engine, rounds: int) -> List[Dict[str, Any]]:
    """Return a row per arm: milliseconds of a step (median, quartiles), MiB kept, both relative to the first arm."""
    replicas = {}
    for arm in plan.arms:
        with lif_backend('eager'):
            replicas[arm] = _replica(engine, plan, arm)
    kept = {arm: kept_for_backward(replica) for arm, replica in replicas.items()}
    groups = {arm: Group([replica], graph=False) for arm, replica in replicas.items()}
    timings = interleave({arm: lambda group=group: group.time_step(STEPS) for arm, group in groups.items()}, rounds)
    steps = STEPS + min(3, STEPS)  # time_step warms up first
    first = next(iter(plan.arms))
    return [dict(arm=arm, ms=round(1e3 * t.median / steps, 2), low=round(1e3 * t.low / steps, 2),
                 high=round(1e3 * t.high / steps, 2), relative=round(t.median / timings[first].median, 3),
                 mib=round(kept[arm], 1), relative_mib=round(kept[arm] / kept[first], 3), rounds=rounds,
                 device=engine.facts['device'], torch=engine.facts['torch'], threads=torch.get_num_threads())
            for arm, t in timings.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--plan', type=Path, required=True, help='plan file')
    parser.add_argument('--data', type=Path, required=True, help='folder made by benchmarks/cifar_arrays.py')
    parser.add_argument('--output', type=Path, default=RESULTS, help='folder of the CSV file')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', choices=['cpu', 'cuda'])
    parser.add_argument('--rounds', type=int, default=7, help='rounds of all arms')
    parser.add_argument('--threads', type=int, default=1, help='CPU threads')
    parser.add_argument('--backend', default='auto', choices=['auto', 'compiled', 'eager'], help='how neurons run')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    plan = ComparisonPlan(args.plan)
    with lif_backend(args.backend):
        rows = measure_costs(plan, Engine(args.data, args.output, args.device), args.rounds)
    for row in rows:
        print(f"{row['arm']:>10} {row['ms']:8.1f} ms ({row['relative']:.2f})  {row['mib']:7.1f} MiB "
              f"({row['relative_mib']:.2f})")
    with open(costs_file(args.output, plan.name), 'w', newline='') as out:
        writer = csv.DictWriter(out, list(rows[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)


if __name__ == '__main__':
    main()
