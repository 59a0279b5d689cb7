#!/usr/bin/env python3
"""Measure the cost of a neuron: forward and backward of a LIF layer compared with a ReLU and with other packages.

    python benchmarks/neuron.py

T = 4 timesteps of a batch of 32 maps of 64 x 32 x 32, in contiguous and channels_last layout, float32 and bfloat16.
Freed memory stays with the process, as in a training in which tensors have the same sizes in every step.
"""
import time
from typing import Callable, Dict, Mapping, Optional

import torch
from harness import Timing, create_parser, has, interleave, keep_freed_memory, save, show

from timm_sscl.neurons import LIF, lif_backend

T = 4
SHAPE = 32, 64, 32, 32
LAYOUTS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
REFERENCE = 'ReLU'


class _Window(torch.autograd.Function):
    """Step function with the closed rectangular window as surrogate, for the recursion in plain torch."""

    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return (u >= .5).to(u.dtype)

    @staticmethod
    def backward(ctx, grad):
        u, = ctx.saved_tensors
        return grad * ((u >= 0) & (u <= 1))


def plain(x: torch.Tensor) -> torch.Tensor:
    """Run the recursion written in plain torch."""
    v, spikes = 0., []
    for x_t in x.unflatten(0, (T, -1)):
        u = .25 * v + x_t
        o = _Window.apply(u)
        v = u * (1 - o)
        spikes.append(o)
    return torch.cat(spikes)


def spikingjelly_lif(detach_reset: bool) -> Optional[Callable]:
    if not has('spikingjelly'):
        return None
    from spikingjelly.activation_based import functional, neuron, surrogate
    node = neuron.LIFNode(tau=4 / 3, decay_input=False, v_threshold=.5, v_reset=0., detach_reset=detach_reset,
                          surrogate_function=surrogate.Sigmoid(), step_mode='m')

    def run(x):
        functional.reset_net(node)
        return node(x.unflatten(0, (T, -1))).flatten(0, 1)
    return run


def snntorch_leaky() -> Optional[Callable]:
    if not has('snntorch'):
        return None
    import snntorch
    leaky = snntorch.Leaky(beta=.25, threshold=.5, reset_mechanism='zero')

    def run(x):
        mem, spikes = leaky.reset_mem(), []
        for x_t in x.unflatten(0, (T, -1)):
            spike, mem = leaky(x_t, mem)
            spikes.append(spike)
        return torch.cat(spikes)
    return run


def eager(neuron: Callable) -> Callable:
    def run(x):
        with lif_backend('eager'):
            return neuron(x)
    run.backend = 'eager'
    return run


VARIANTS: Dict[str, Optional[Callable]] = {
    REFERENCE: torch.relu,
    'LIF': LIF(T),
    'LIF, detached reset': LIF(T, detach_reset=True),
    'LIF, soft reset': LIF(T, v_reset=None),
    'LIF without a compiler': eager(LIF(T)),
    'the recursion in plain torch': plain,
    'SpikingJelly LIFNode': spikingjelly_lif(False),
    'SpikingJelly LIFNode, detached reset': spikingjelly_lif(True),
    'snnTorch Leaky in a loop': snntorch_leaky(),
}


def step(neuron: Callable, x: torch.Tensor, grad: torch.Tensor) -> None:
    with lif_backend(getattr(neuron, 'backend', 'auto')):  # also applies to the backward
        torch.autograd.grad(neuron(x), x, grad)


def measure(
        variants: Mapping[str, Optional[Callable]],
        layout: str,
        dtype: torch.dtype,
        rounds: int,
        clock: Callable[[], float] = time.perf_counter,
) -> Dict[str, Timing]:
    """Return the time of forward and backward of layers on currents of T timesteps. None is left out."""
    torch.manual_seed(0)
    x = torch.randn(T * SHAPE[0], *SHAPE[1:]).to(dtype).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    grad = torch.randn_like(x)
    return interleave({name: lambda n=neuron: step(n, x, grad) for name, neuron in variants.items() if neuron}, rounds,
                      clock=clock)


def main() -> None:
    args = create_parser(__doc__, rounds=15).parse_args()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    absent = [name for name, neuron in VARIANTS.items() if neuron is None]
    rows = [dict(neuron=name) for name in VARIANTS]
    times = []
    for dtype in (torch.float32, torch.bfloat16):
        for layout in LAYOUTS:
            column = f'{str(dtype).split(".")[1]}, {layout}'
            print(column)
            timings = measure(VARIANTS, layout, dtype, args.rounds)
            for row in rows:
                timing = timings.get(row['neuron'])
                row[column] = timing and timing.median / timings[REFERENCE].median
                milliseconds = {k: v * 1e3 for k, v in timing._asdict().items()} if timing else {}
                times.append(dict(neuron=row['neuron'], case=column, **milliseconds))
    show(f'forward + backward on [{T}, {", ".join(map(str, SHAPE))}], ReLU = 1', rows)
    show('milliseconds: median and quartiles', times)
    for name in absent:
        print(f'absent: {name}')
    save(args.output, 'neuron', {'ratios': rows, 'milliseconds': times})


if __name__ == '__main__':
    main()
