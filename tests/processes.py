"""Several processes on CPU for a test."""
import datetime
import multiprocessing
import os
from typing import Any, Callable, List

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _start(rank: int, worker: Callable[[int], Any], world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/init', rank=rank, world_size=world_size,
                            timeout=datetime.timedelta(seconds=60))
    try:
        result = worker(rank)
    except Exception as error:  # raised in the parent; the other processes are out of step from here
        result = error
    torch.save(result, os.path.join(folder, f'{rank}.pt'))
    os._exit(0)  # a process group out of step would wait for the others at exit


def run_processes(worker: Callable[[int], Any], world_size: int, folder: Any) -> List[Any]:
    """What worker(rank) returns on every process of a gloo group; worker is a function of a module.

    The processes are forked from one that has imported the libraries, which is started once.
    """
    multiprocessing.set_forkserver_preload(['torch', 'torchvision', 'timm', 'timm_sscl'])
    mp.start_processes(
        _start, args=(worker, world_size, str(folder)), nprocs=world_size, join=True, start_method='forkserver')
    results = [torch.load(os.path.join(folder, f'{rank}.pt'), weights_only=False) for rank in range(world_size)]
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results
