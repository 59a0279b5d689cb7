"""The plans of benchmarks/compare.py on one GPU: processes side by side, so that one trains while another captures."""
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import List, Sequence

__all__ = ['PLANS', 'science']

ROOT = Path(__file__).resolve().parent
PLANS = ('inverse_cka', 'deeper_looks'), ('zoo', 'head_to_head')  # of one process each, in this order


def science(
        data: Path,
        output: Path,
        minutes: float,
        options: Sequence[str] = (),
        plans: Sequence[Sequence[str]] = PLANS,
        folder: Path = ROOT / 'plans',
) -> int:
    """Run plans side by side. They append to the same runs.jsonl; what is printed goes to one log each.

    Args:
        data: Folder made by benchmarks/cifar_arrays.py.
        output: Folder of the results.
        minutes: Time limit.
        options: Further options of benchmarks/compare.py.
        plans: Names of the plans of every process.
        folder: Folder of the plans.

    Returns:
        Number of processes that failed.
    """
    output.mkdir(parents=True, exist_ok=True)
    workers = max(1, (os.cpu_count() or 2) // len(plans) - 2)
    path = os.pathsep.join([str(ROOT.parent), *filter(None, [os.environ.get('PYTHONPATH')])])
    processes = []
    for names in plans:
        command: List[str] = [
            sys.executable, str(ROOT / 'compare.py'), '--plan', *(str(folder / f'{name}.yaml') for name in names),
            '--data', str(data), '--output', str(output), '--minutes', str(minutes), '--workers', str(workers),
            *options]
        with open(output / f'{names[0]}.log', 'a') as log:
            processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT,
                                              env={**os.environ, 'PYTHONPATH': path, 'PYTHONUNBUFFERED': '1'}))
    while any(process.poll() is None for process in processes):
        time.sleep(1)
    for names, process in zip(plans, processes):
        text = (output / f'{names[0]}.log').read_text()
        print(f'{", ".join(names)}: exit status {process.returncode}\n{text[-2000:]}', flush=True)
    return sum(process.returncode != 0 for process in processes)
