"""benchmarks/conversion.py: accuracies over T from one run, table and figure from the results."""
import sys

import pytest
import timm
import torch

from runs import ROOT
from timm_sscl import convert_ann

sys.path.insert(0, str(ROOT / 'benchmarks'))

import conversion


def test_one_run_at_the_largest_t_gives_all_accuracies():
    torch.manual_seed(0)
    ann = timm.create_model('resnet20_cifar', width=4, num_classes=4, zero_init_last=False).eval()
    images = torch.randn(40, 3, 16, 16)
    batches = list(zip(images.split(16), ann(images).argmax(1).split(16)))
    model = convert_ann(ann, images)
    found = conversion.top1_over_time(model, batches, [1, 3, 6])
    assert found == [conversion.top1(model.set_timesteps(t), batches) for t in (1, 3, 6)]
    assert len(set(found)) > 1


def test_samples_are_spread_and_repeated():
    dataset = list(range(10))
    assert sorted(conversion.spread(dataset, 4).indices) == [0, 3, 6, 9]
    assert sorted(conversion.spread(dataset, 25).indices) == sorted([*range(10)] * 2 + list(
        conversion.spread(dataset, 10).indices[:5]))


def test_rows_become_table_figure_and_page(tmp_path):
    rows = [conversion.Row('digits', seed, rule, t, 10. * t + seed, 50)
            for seed in (1, 3) for rule in ('maximum', 'QCFS') for t in (0, 2, 4)]
    conversion.write(tmp_path / 'conversion.csv', rows[::-1])
    assert conversion.read(tmp_path / 'conversion.csv') == rows
    lines = conversion.table(rows)
    assert lines[0] == '| data | thresholds | seeds | ANN | T=2 | T=4 |'
    assert lines[2] == '| digits | maximum | 2 | 2.0 ± 1.4 | 22.0 ± 1.4 | 42.0 ± 1.4 |'
    page = tmp_path / 'page.md'
    page.write_text(f'before\n{conversion.BEGIN}\nstale\n{conversion.END}\nafter\n')
    conversion.report(tmp_path, page)
    text = page.read_text()
    assert 'stale' not in text and 'digits: 50 validation images' in text and lines[3] in text
    assert text.startswith('before') and text.endswith('after\n')
    assert (tmp_path / 'conversion.png').stat().st_size > 1000


@pytest.mark.parametrize('name', conversion.RULES)
def test_options_of_every_rule_convert(name):
    images = torch.randn(4, 3, 16, 16)
    model = convert_ann(timm.create_model('resnet20_cifar', width=4, num_classes=4), images, 2,
                        **conversion.RULES[name].options)
    assert all(lif.scale is not None for lif in model.neurons().values())
