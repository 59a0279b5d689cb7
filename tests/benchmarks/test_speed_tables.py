"""Tables of the speed benchmarks: ratios, the Pareto front, slopes over T, and what a piece keeps of the others."""
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / 'benchmarks'))

import harness
import neuron_costs
import performance
import scaling
import train_step


def _time(name, seconds):
    return dict(variant=name, median=seconds, low=.9 * seconds, high=1.2 * seconds)


def test_ratios_are_to_the_ann_and_the_front_holds_what_nothing_beats_in_both():
    seconds = {'ANN': 2., 'ANN, checkpointing': 1., 'spiking': 2.2, 'packed spikes': 2.4, 'detached reset': 2.,
               'checkpointing': 3., 'SpikingJelly\'s spiking_resnet18': .1}
    mib = {'ANN': 100., 'ANN, checkpointing': 10., 'spiking': 120., 'packed spikes': 70., 'detached reset': 110.,
           'checkpointing': 80., 'SpikingJelly\'s spiking_resnet18': 1.}
    rows = {row['step']: row for row in train_step.table(
        [_time(*item) for item in seconds.items()], [dict(variant=n, MiB=m) for n, m in mib.items()])}
    assert rows['spiking']['time'] == pytest.approx(1.1) and rows['spiking']['memory'] == pytest.approx(1.2)
    assert rows['spiking']['low'] == pytest.approx(.99) and rows['spiking']['high'] == pytest.approx(1.32)
    # not 'spiking' (detached beats it), not 'checkpointing' (packed does); neither ANNs nor peers compete
    assert [name for name, row in rows.items() if row['best']] == ['packed spikes', 'detached reset']


def test_growth_is_the_slope_over_t_relative_to_the_ann():
    cost = {'ANN': (2., 10.), 'spiking': (3., 9.), 'spiking, packed': (4., 5.)}  # seconds and MiB per timestep
    rows = [dict(case, seconds=1 + cost[case['kind']][0] * case['timesteps'],
                 MiB=50 + cost[case['kind']][1] * case['timesteps']) for case in scaling.cases().values()]
    found = {row['what']: row for row in scaling.growth(rows)}
    assert found['spiking, seconds']['ratio'] == pytest.approx(1.5)
    assert found['spiking, packed, MiB']['ratio'] == pytest.approx(.5)
    assert all(row['off_the_line_percent'] == pytest.approx(0, abs=1e-9) for row in found.values())


def test_a_piece_keeps_the_others_of_this_machine_only(tmp_path):
    file = tmp_path / 'neuron_costs.json'
    assert neuron_costs.known_tables(file) == {}
    harness.save(tmp_path, 'neuron_costs', {'contiguous': [dict(neuron='lif')]})
    assert neuron_costs.known_tables(file) == {'contiguous': [dict(neuron='lif')]}
    runs = json.loads(file.read_text())
    runs[0]['machine']['cpu'] = 'another'
    file.write_text(json.dumps(runs))
    assert neuron_costs.known_tables(file) == {}


def test_pieces_are_run_until_they_were_measured_here(tmp_path, monkeypatch):
    monkeypatch.setattr(performance, 'RESULTS', tmp_path)
    ran = []
    monkeypatch.setattr(performance.subprocess, 'run', lambda command, check: ran.append(command))
    performance.run_missing('vit_tiny', 'nice -n 5')
    assert [command[:3] for command in ran] == [['nice', '-n', '5']] * 2
    assert [command[-1] for command in ran] == ['time', 'memory']
    harness.save(tmp_path, train_step.name_of('vit_tiny_patch16_224', 'contiguous', 'time'), {})
    ran.clear()
    performance.run_missing('vit_tiny', '')
    assert [command[-1] for command in ran] == ['memory']


def test_memory_is_measured_without_the_settings_that_keep_freed_blocks(monkeypatch):
    monkeypatch.setenv('MALLOC_MMAP_MAX_', '0')
    seen = {}

    class Done:
        returncode, stdout, stderr = 0, 'warm\n{}\n', ''

    def run(command, env, **options):
        seen.update(env)
        return Done
    monkeypatch.setattr(harness.subprocess, 'run', run)
    assert harness.output_of_fresh_process('script.py', 'x') == '{}'
    assert 'MALLOC_MMAP_MAX_' not in seen and seen['MALLOC_MMAP_THRESHOLD_'] == '65536'
