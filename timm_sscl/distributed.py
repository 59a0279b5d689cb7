"""The global batch of several processes: its rows, with gradients, and its means."""
from typing import Iterator, List, Optional, Sequence

import torch
import torch.distributed as dist

__all__ = ['gather_rows', 'blocks_in_turn', 'batch_counts', 'batch_mean', 'batch_share', 'world_size']


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
    def forward(ctx, rows, counts):
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
        return grad[ctx.start:ctx.start + ctx.count], None


def gather_rows(rows: torch.Tensor, counts: Optional[Sequence[int]] = None) -> torch.Tensor:
    """Rows of all processes in the order of their ranks, (N, d) from (n, d); batches may differ in size.

    The gradient is summed over the processes. Where every process takes the same loss of the gathered rows, DDP's mean
    of the gradients then is the gradient of that loss.

    Args:
        rows: This process's rows.
        counts: `batch_counts` where they are known, which saves asking for them.
    """
    if world_size() == 1:
        return rows
    return _GatherRows.apply(rows, batch_counts(rows.shape[0], rows.device) if counts is None else counts)


def blocks_in_turn(rows: torch.Tensor, counts: Sequence[int]) -> Iterator[torch.Tensor]:
    """Every process's rows (T, n, p), by rank, one at a time: no more than one other block is held. No gradient."""
    for rank, count in enumerate(counts):
        own = rank == dist.get_rank()
        block = rows.contiguous() if own else rows.new_empty(rows.shape[0], count, *rows.shape[2:])
        dist.broadcast(block, rank)
        yield block


def batch_mean(values: torch.Tensor, count: int) -> torch.Tensor:
    """Means over the global batch, (d,), from every process's means over its own `count` samples, with gradients."""
    if world_size() == 1:
        return values
    sums = gather_rows((values * count).unsqueeze(0), [1] * world_size()).sum(0)
    return sums / sum(batch_counts(count, values.device))


def batch_share(count: int, like: torch.Tensor) -> torch.Tensor:
    """Factor that turns a mean over a process's own samples into its part of the mean over the global batch.

    DDP averages gradients over the processes, whatever the sizes of their batches: n * W / N makes that the mean over
    the N samples of the W processes. 0-d, of like's device and dtype, but float32 at least.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    total = torch.tensor(count, dtype=dtype, device=like.device)
    dist.all_reduce(total)
    return count * dist.get_world_size() / total
