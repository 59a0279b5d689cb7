"""Rows of all processes, with gradients."""
from typing import List

import torch
import torch.distributed as dist

__all__ = ['gather_rows', 'batch_counts', 'batch_mean', 'world_size']


def world_size() -> int:
    """Number of processes, 1 where no process group is running."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def batch_counts(count: int, device: torch.device) -> List[int]:
    """Number of samples of every process, by rank; batches may differ in size."""
    if world_size() == 1:
        return [count]
    counts = torch.zeros(world_size(), dtype=torch.int64, device=device)
    counts[dist.get_rank()] = count
    dist.all_reduce(counts)
    return counts.tolist()


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows):
        counts = batch_counts(rows.shape[0], rows.device)
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[:rows.shape[0]] = rows
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded)
        ctx.start = sum(counts[:dist.get_rank()])
        ctx.count = rows.shape[0]
        return torch.cat([g[:n] for g, n in zip(gathered, counts)])

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad[ctx.start:ctx.start + ctx.count]


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows of all processes in the order of their ranks, (N, d) from (n, d); batches may differ in size.

    The gradient is summed over the processes. Where every process takes the same loss of the gathered rows, DDP's mean
    of the gradients then is the gradient of that loss.
    """
    return _GatherRows.apply(rows) if world_size() > 1 else rows


def batch_mean(values: torch.Tensor, count: int) -> torch.Tensor:
    """Means over the global batch, (d,), from every process's means over its own `count` samples, with gradients."""
    if world_size() == 1:
        return values
    sums = gather_rows((values * count).unsqueeze(0)).sum(0)
    return sums / sum(batch_counts(count, values.device))
