"""The faster precision of a step on this CPU, measured once for an output, so that its runs have one precision."""
import fcntl
import json
import statistics
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Protocol

__all__ = ['decided_precision', 'time_precisions']

PRECISIONS = 'float32', 'bfloat16'
_ROUNDS = 3  # one step of each precision per round, after one that isn't timed


class Step(Protocol):
    """A training step that can be timed, such as that of a Replica."""
    def train_mode(self, mode: bool) -> Any: ...
    def rewind(self) -> Any: ...
    def train_step(self) -> Any: ...


def time_precisions(create: Callable[[str], Step]) -> Dict[str, float]:
    """Return the median milliseconds of a training step in each precision, measured in turn.

    Args:
        create: Create a step in a precision, with its state.
    """
    replicas = {name: create(name) for name in PRECISIONS}
    times: Dict[str, List[float]] = {name: [] for name in PRECISIONS}
    for i in range(1 + _ROUNDS):
        for name, replica in replicas.items():
            replica.train_mode(True)
            replica.rewind()
            began = time.perf_counter()
            replica.train_step()
            times[name] += [1e3 * (time.perf_counter() - began)] * (i > 0)
    return {name: statistics.median(values) for name, values in times.items()}


def decided_precision(output: Path, device: str, create: Callable[[str], Step]) -> str:
    """Return the precision of an output: the one of its file precision.json, or the faster one, which is written there.

    Raises:
        SystemExit: The file was written on another kind of device.
    """
    file = output / 'precision.json'
    with open(output / 'precision.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.is_file():
            times = time_precisions(create)
            faster = min(times, key=lambda name: times[name])
            file.write_text(json.dumps(dict(device=device, precision=faster, ms=times)))
        decided = json.loads(file.read_text())
    steps = ', '.join(f'{name} {ms:.0f} ms' for name, ms in decided['ms'].items())
    print(f"precision {decided['precision']}: a step of cross-entropy took {steps} ({file})", flush=True)
    if decided['device'] != device:
        raise SystemExit(f"{file}: measured on '{decided['device']}', but this is '{device}'. Runs of two kinds of "
                         'devices are never compared; give another --output.')
    return decided['precision']
