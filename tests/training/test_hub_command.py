"""What train.py writes loads by itself, and timm-sscl-hub saves it with a card that says what the run's files say."""
import json
import shutil

import pytest
import timm
import torch

import train
from runs import TINY, rows_of, run_here
from timm_sscl import load, unregister_neuron
from timm_sscl.training.runs.hub_command import main

PLUGIN = '''
from timm_sscl import register_neuron
from timm_sscl.neurons import LIF

@register_neuron('lif_of_the_hub_test')
class Mine(LIF):
    pass
'''


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """(folder, student as trained) of a run with a plug-in's neuron, a residual variant and averaged weights."""
    cwd, ended = tmp_path_factory.mktemp('runs'), []
    (cwd / 'my_neuron.py').write_text(PLUGIN)
    summarize = train.summarize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, 'summarize', lambda *args: (ended.append(args[2]), summarize(*args)))
        run_here([*TINY[2:], '--model', 'spiking_test_resnet', '--model-kwargs', 'stem_width=4', 'channels=(8,8,8,8)',
                  '--plugin', 'my_neuron.py', '--neuron', 'lif_of_the_hub_test', '--residual', 'sew', '--share-stem',
                  '--epochs', '1', '--distill', 'none', '--model-ema', '--model-ema-decay', '0.5', '--output', 'out',
                  '--experiment', 'run', '--train-num-samples', '32', '--val-num-samples', '20'], cwd, patch)
    yield cwd / 'out' / 'run', ended[0].eval()
    unregister_neuron('lif_of_the_hub_test')


def images():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_a_checkpoint_suffices(run):
    folder, student = run
    expected = student(images(), per_step=True)
    assert torch.equal(load(folder / 'last.pth.tar', use_ema=False)(images(), per_step=True), expected)
    averaged = torch.load(folder / 'last.pth.tar', weights_only=True)['state_dict_ema']
    model = load(folder / 'last.pth.tar')
    assert model.settings == student.settings and model.settings.stem is not None
    config = timm.data.resolve_model_data_config(model)  # as the run's images, digits of 32 x 32
    assert config['input_size'] == (3, 32, 32) and config['mean'] == config['std'] == (.5, .5, .5)
    assert model.pretrained_cfg['num_classes'] == 10
    assert load(folder / 'last.pth.tar', num_classes=7)(images()).shape[1] == 7  # as timm: another classifier
    with pytest.raises(ValueError, match="the weights do not fit .*, of which load was given {'stem_width': 8}"):
        load(folder / 'last.pth.tar', stem_width=8)
    state = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    assert state and all(torch.equal(value, averaged[name]) for name, value in state.items())
    assert not torch.equal(model(images(), per_step=True), expected)


@torch.no_grad()
def test_the_folder_of_a_run(run, tmp_path, capsys, monkeypatch):
    folder, _ = run
    main([str(folder), str(tmp_path / 'mine'), '--license', 'mit'])
    assert capsys.readouterr().out.strip().splitlines()[-1] == str(tmp_path / 'mine')
    model = timm.create_model(f'local-dir:{tmp_path / "mine"}', pretrained=True)
    expected = load(folder / 'model_best.pth.tar')
    assert model.settings == expected.settings
    assert torch.equal(model.eval()(images(), per_step=True), expected(images(), per_step=True))
    config = json.loads((tmp_path / 'mine' / 'config.json').read_text())
    assert config['label_names'] == [str(digit) for digit in range(10)]
    assert config['pretrained_cfg']['mean'] == [.5, .5, .5] and config['pretrained_cfg']['input_size'] == [3, 32, 32]
    card, (row,) = (tmp_path / 'mine' / 'README.md').read_text(), rows_of(folder)
    summary = json.loads((folder / 'summary.json').read_text())
    rates = summary['firing_rates'].values()
    for text in (f'**Accuracy:** {float(row["eval_top1_ema"]):.2f} top-1, {float(row["eval_top5_ema"]):.2f} top-5',
                 '**Teacher:** none', '**Data:** digits', '**Losses:** cross-entropy\n', 'license: mit',
                 f'{sum(rates) / len(rates):.3f} spikes per neuron and timestep, mean of {len(rates)} layers',
                 f'{summary["energy"]["spiking_uj"]:.3g} microjoules', 'of the weights that are not averaged',
                 'my_neuron.py; import before loading', 'epoch 1 of 1, seed 42, averaged weights', 'residual=sew'):
        assert text in card, text
    assert str(folder.parent) not in card  # no path of this machine


def test_the_card_says_no_number_of_other_weights(run, tmp_path):
    """Of a run that was interrupted within an epoch, and of averaged weights that were not validated."""
    folder, (row,) = run[0], rows_of(run[0])
    cut = shutil.copytree(folder, tmp_path / 'cut')
    (cut / 'summary.json').unlink()
    content = torch.load(cut / 'last.pth.tar', weights_only=True)
    content['run_state']['position'] = (1, 3)  # as RunSaver.save_recovery writes it: 'epoch' is that of the last row
    torch.save(content, cut / 'recovery-1-3.pth.tar')
    main([str(cut), str(tmp_path / 'a'), '--checkpoint', 'recovery-1-3.pth.tar'])
    card = (tmp_path / 'a' / 'README.md').read_text()
    assert 'epoch 2 of 1, after its step 3, seed 42' in card
    assert not any(title in card for title in ('Accuracy', 'Firing rate', 'Losses', 'Energy'))
    rows = (cut / 'summary.csv').read_text()
    (cut / 'summary.csv').write_text(rows.replace('eval_top1_ema', 'other'))  # as with --model-ema-force-cpu
    main([str(cut), str(tmp_path / 'b')])
    text = f'{float(row["eval_top1"]):.2f} top-1, {float(row["eval_top5"]):.2f} top-5 on the validation split (of the '
    assert f'{text}weights that are not averaged)' in (tmp_path / 'b' / 'README.md').read_text()


def test_what_is_refused(run, tmp_path, capsys):
    folder, _ = run
    for argv, text in (
            ([str(tmp_path), 'x'], 'holds no run of train.py'), ([str(folder), str(folder)], 'holds something already'),
            ([str(folder), 'x', '--checkpoint', 'best'], "no checkpoint 'best'; it has checkpoint-0.pth.tar")):
        with pytest.raises(SystemExit):
            main(argv)
        assert text in capsys.readouterr().err
