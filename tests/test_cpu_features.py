"""The CPU's bfloat16 instructions are read from Linux, and train.py says where they are missing."""
import logging

import pytest

import timm_sscl.training.processes as processes
from runs import run_here
from timm_sscl.cpu_features import cpu_capability, has_fast_bfloat16

X86 = 'processor\t: 0\nmodel name\t: x\nflags\t\t: fpu avx2 {}\nbugs\t\t: y\n\nprocessor\t: 1\nflags\t\t: fpu\n'
ARM = 'processor\t: 0\nFeatures\t: fp asimd {}\n'


@pytest.mark.parametrize('text, fast, named', [
    (X86.format('avx512f avx512_bf16'), True, ['AVX512-BF16']),
    (X86.format('avx512f avx512_bf16 amx_tile amx_bf16'), True, ['AVX512-BF16', 'AMX']),
    (X86.format('amx_bf16'), True, ['AMX']), (ARM.format('bf16 i8mm'), True, ['BF16']),
    (X86.format('avx512f avx512_fp16 amx_tile'), False, ['no bfloat16']),
    (ARM.format('asimdhp'), False, ['no bfloat16']),
    ('processor\t: 0\n', None, []), (None, None, [])])
def test_bfloat16_by_the_flags_of_linux(text, fast, named, tmp_path):
    file = tmp_path / 'cpuinfo'
    if text is not None:
        file.write_text(text)
    assert has_fast_bfloat16(file) is fast
    assert cpu_capability(file).split(', ')[1:] == named


@pytest.mark.parametrize('options, asks', [
    ([], False), (['--amp', '--amp-dtype', 'bfloat16'], True), (['--model-dtype', 'bfloat16'], True),
    (['--model-dtype', 'float64'], False)], ids=str)
@pytest.mark.parametrize('fast', [True, False, None])
def test_slow_bfloat16_is_said_before_the_start(fast, options, asks, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(processes, 'has_fast_bfloat16', lambda: fast)
    with caplog.at_level(logging.WARNING), pytest.raises(SystemExit):  # no such folder, which comes later
        run_here(['--data-dir', 'missing', '--device', 'cpu', *options], tmp_path, monkeypatch)
    said = [record.getMessage() for record in caplog.records if 'AVX512-BF16' in record.getMessage()]
    assert bool(said) == (asks and fast is False)
    assert all(options[-2 if '--amp' in options else 0] in text for text in said)
