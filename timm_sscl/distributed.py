"""Operations on the global batch of several processes: gather rows with gradients, take means."""
from typing import Iterator, List, Optional, Sequence

import torch
import torch.distributed as dist

__all__ = ['gather_rows', 'blocks_in_turn', 'batch_counts', 'batch_mean', 'batch_share', 'from_first', 'world_size']


def world_size() -> int:
    """Return the number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def batch_counts(count: int, device: torch.device) -> List[int]:
    """Return the number of samples of every process, by rank. Batches may differ in size."""
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
    """Gather the rows of all processes by rank: (n, d) here to (N, d). Batches may differ in size.

    The gradient is summed over the processes. DDP then averages it. If every process computes the same loss of the
    gathered rows, the result is the gradient of that loss.

    Args:
        rows: This process's rows.
        counts: Result of `batch_counts`; passing it saves one collective call.
    """
    if world_size() == 1:
        return rows
    return _GatherRows.apply(rows, batch_counts(rows.shape[0], rows.device) if counts is None else counts)


def blocks_in_turn(rows: torch.Tensor, counts: Sequence[int]) -> Iterator[torch.Tensor]:
    """Yield the rows (T, n, p) of every process, by rank. Only one other block is in memory at a time. No gradient."""
    for rank, count in enumerate(counts):
        own = rank == dist.get_rank()
        block = rows.contiguous() if own else rows.new_empty(rows.shape[0], count, *rows.shape[2:])
        dist.broadcast(block, rank)
        yield block


def from_first(values: torch.Tensor) -> torch.Tensor:
    """Return the first process's values on every process, in the same tensor."""
    if world_size() > 1:
        dist.broadcast(values, 0)
    return values


def batch_mean(values: torch.Tensor, count: int) -> torch.Tensor:
    """Return means over the global batch, (d,), with gradients.

    Args:
        values: Means over this process's samples, (d,).
        count: Number of this process's samples.
    """
    if world_size() == 1:
        return values
    sums = gather_rows((values * count).unsqueeze(0), [1] * world_size()).sum(0)
    return sums / sum(batch_counts(count, values.device))


def batch_share(count: int, like: torch.Tensor) -> torch.Tensor:
    """Return the factor that turns a mean over this process's samples into its share of the mean over the global batch.

    DDP averages gradients over the W processes and ignores the sizes of their batches. With n of N samples here, the
    factor n * W / N makes the average equal to the mean over all N samples. 0-d, on the device of `like`, at least
    float32.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    total = torch.tensor(count, dtype=dtype, device=like.device)
    dist.all_reduce(total)
    return count * dist.get_world_size() / total
