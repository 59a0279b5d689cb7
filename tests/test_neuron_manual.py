"""The manual's page of neurons, norms and residuals has all of them, with commands that work."""
import re
import shlex

import pytest

from runs import ROOT
from tiny_training import student
from timm_sscl import list_neurons, list_surrogates, list_variants

PAGE = (ROOT / 'docs' / 'pages' / 'neurons.md').read_text()
ENTRY = re.compile(r'^\*\*`(\w+)`\*\*: (.+)\nSource: (.+?)\. Command: `(.+?)`\. Costs: (.+?)\. Hardware: (.+)\.$', re.M)
ENTRIES = {match[0]: match for match in ENTRY.findall(PAGE)}


def test_every_name_is_there_once():
    names = [*list_neurons(), *list_variants('norm'), *list_variants('residual')]
    assert sorted(match[0] for match in ENTRY.findall(PAGE)) == sorted(names)
    for name in [*list_neurons(), *list_surrogates()]:
        assert f'\n| `{name}` |' in PAGE  # the tables of equations and surrogates


@pytest.mark.parametrize('name', ENTRIES)
def test_its_command_makes_a_model_with_it(name):
    _, text, _, command, _, _ = ENTRIES[name]
    assert len(re.findall(r'[.!](?: |$)', text)) == 2  # sentences
    model = student([*shlex.split(command), '--model', 'spiking_test_resnet', '--img-size', '32', '-T', '2'])
    assert name in (model.settings.neuron, model.settings.norm, model.settings.residual)
