"""What the CPU computes fast."""
import os
from functools import lru_cache
from pathlib import Path
from typing import FrozenSet, Optional

import torch

__all__ = ['cpu_capability', 'has_fast_bfloat16', 'int8_instructions']

_CPUINFO = Path('/proc/cpuinfo')
# flag of Linux -> name
_BFLOAT16 = {'avx512_bf16': 'AVX512-BF16', 'amx_bf16': 'AMX', 'bf16': 'BF16'}  # the last one is Arm's


def _flags(cpuinfo: Path) -> FrozenSet[str]:
    """Return the flags of the first core; none where Linux does not list them."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return frozenset()
    listed = (line.partition(':')[2] for line in lines if line.startswith(('flags', 'Features')))
    return frozenset(next(listed, '').split())


def has_fast_bfloat16(cpuinfo: Path = _CPUINFO) -> Optional[bool]:
    """Return whether the CPU has instructions for bfloat16; None if that is unknown (another system than Linux).

    Without them (AVX512-BF16 or AMX, BF16 on Arm) a convolution in bfloat16 takes several times as long as in float32.
    """
    flags = _flags(cpuinfo)
    return bool(flags & _BFLOAT16.keys()) if flags else None


@lru_cache(maxsize=None)
def int8_instructions(cpuinfo: Path = _CPUINFO) -> str:
    """Return which instructions oneDNN has for products of int8: 'AMX', 'VNNI', or '' without any or where unknown.

    An int8 convolution took 0.1 to 0.15 of the time of a float32 one with AMX, 0.2 to 0.3 with VNNI, and 0.3 to 0.65
    without. ONEDNN_MAX_CPU_ISA limits oneDNN, and so the answer; both read it once.
    """
    flags, limit = _flags(cpuinfo), os.environ.get('ONEDNN_MAX_CPU_ISA', '').upper() or 'ALL'
    unlimited = limit in ('ALL', 'DEFAULT')
    if 'amx_int8' in flags and (unlimited or 'AMX' in limit):
        return 'AMX'
    newer = unlimited or any(name in limit for name in ('VNNI', 'BF16', 'FP16', 'AMX', 'AVX10'))
    return 'VNNI' if newer and flags & {'avx512_vnni', 'avx_vnni'} else ''


def cpu_capability(cpuinfo: Path = _CPUINFO) -> str:
    """Return the instructions that PyTorch uses and those for bfloat16, for a benchmark: 'AVX512, AVX512-BF16, AMX'."""
    flags = _flags(cpuinfo)
    named = [name for flag, name in _BFLOAT16.items() if flag in flags] or (['no bfloat16'] if flags else [])
    return ', '.join([torch.backends.cpu.get_cpu_capability(), *named])
