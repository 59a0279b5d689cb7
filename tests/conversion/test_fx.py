"""torch.fx: timm's feature extraction from graphs, on spiking models, gives what the models themselves compute."""
import copy

import pytest
import timm
import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import get_notrace_functions, get_notrace_modules
from timm.models import create_feature_extractor
from torchvision.models.feature_extraction import create_feature_extractor as create_extractor
from torchvision.models.feature_extraction import get_graph_node_names

from timm_sscl import calibrate, convert_ann, convert_to_spiking, share_stem

T, B, K = 2, 3, 5
SMALLER = dict(vgg11_bn=dict(mlp_ratio=1 / 64), densenet121=dict(growth_rate=8, block_config=(2, 3, 2, 2)))


def _images(n=B, size=32):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def _create(name, **kwargs):
    torch.manual_seed(0)
    kwargs.update(dict(img_size=32, depth=2) if 'vit_' in name else SMALLER.get(name, {}))
    model = timm.create_model(f'spiking_{name}', timesteps=T, num_classes=K, **kwargs)
    calibrate(model, _images())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(_images(8))  # running statistics, so that it fires in evaluation mode
    return model


def _trace(model):
    """As timm's own tests do: the last node, which is the output."""
    tracer = dict(leaf_modules=list(get_notrace_modules()), autowrap_functions=list(get_notrace_functions()),
                  param_shapes_constant=True)
    train_nodes, eval_nodes = get_graph_node_names(model, tracer_kwargs=tracer)
    return create_extractor(model, train_return_nodes={train_nodes[-1]: 'out'},
                            eval_return_nodes={eval_nodes[-1]: 'out'}, tracer_kwargs=tracer)


# functional activations (densenet: batch norm with act; xception), gates, attention, dropout of all kinds
@pytest.mark.parametrize('name', [
    'test_resnet', 'vit_tiny_patch16_224', 'test_vit', 'test_convnext', 'test_efficientnet', 'test_nfnet',
                                  'test_mambaout', 'densenet121', 'mobilenetv3_small_050', 'vgg11_bn'])
def test_output_is_the_models(name):
    model = _create(name).eval()
    graph, x = _trace(model), _images()
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(graph(x)['out'], expected) and expected.std() > 0
        assert torch.equal(graph(_images(5))['out'], model(_images(5)))  # another batch
        assert torch.equal(graph(x, per_step=True)['out'], model(x, per_step=True))


def test_features_are_the_models():
    model, x = _create('test_resnet').eval(), _images()
    names = ['layer1', 'layer2.0.act1', 'layer4', 'global_pool', 'fc']
    extract, seen = create_feature_extractor(model, names), {}
    handles = [model.get_submodule(name).register_forward_hook(
        lambda m, args, out, name=name: seen.update({name: out})) for name in names]
    with torch.no_grad():
        model(x)
        for handle in handles:
            handle.remove()
        features = extract(x)
    assert list(features) == names
    assert all(torch.equal(features[name], seen[name]) and len(seen[name]) == T * B for name in names)


def test_training_through_a_graph():
    model = _create('test_resnet', drop_rate=.3, drop_path_rate=.3, norm='tdbn').train()
    graph, x = _trace(copy.deepcopy(model)).train(), _images()
    for net in (model, graph):
        torch.manual_seed(1)
        out = net(x)
        (out['out'] if net is graph else out).square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients and all(torch.equal(graph.get_parameter(name).grad, g) for name, g in gradients.items())


def test_event_frames_and_shared_stem():
    model = _create('test_resnet').eval()
    frames = torch.randn(B, T, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(_trace(model)(frames)['out'], model(frames))
        share_stem(model)
        assert torch.equal(_trace(model)(_images())['out'], model(_images()))


class _Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.Linear(6, K)

    def forward(self, x):
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return self.head(F.dropout(x.mean((2, 3)), 0.5, self.training))


@pytest.mark.parametrize('convert', [convert_to_spiking, lambda m, timesteps: convert_ann(m, _images(), timesteps)])
def test_functional_activations(convert):
    torch.manual_seed(0)
    model = convert(_Functional(), timesteps=T).eval()
    graph = _trace(model)
    with torch.no_grad():
        assert torch.equal(graph(_images())['out'], model(_images()))


def test_graph_refuses_what_it_was_not_traced_for():
    model = _create('test_resnet').eval()
    graph = _trace(model)
    with pytest.raises(TypeError, match='no further arguments'):
        graph(_images(), False, _images())
    model.set_timesteps(1)
    with pytest.raises(RuntimeError, match='traced with timesteps=2'):
        graph(_images())
    layer = nn.Sequential(model.layer1[0].conv1, model.layer1[0].act1)
    tracer = torch.fx.Tracer()
    tracer.is_leaf_module = lambda m, name: True
    with pytest.raises(RuntimeError, match='called outside'):
        # a part by itself folds nothing
        torch.fx.GraphModule(layer, tracer.trace(layer))(torch.randn(4, layer[0].in_channels, 4, 4))


def test_features_only_by_fx():
    model = timm.create_model('spiking_resnet10t', features_only=True, feature_cls='fx', timesteps=T).eval()
    other = timm.create_model('spiking_resnet10t', features_only=True, timesteps=T).eval()
    other.load_state_dict({k.replace('graph_module.', ''): v for k, v in model.state_dict().items()}, strict=False)
    with torch.no_grad():
        features = model(_images(size=64))
    assert [f.shape for f in features] == [f.shape for f in other(_images(size=64))]
    assert all(len(f) == B for f in features)
