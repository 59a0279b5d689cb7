#!/usr/bin/env python3
"""Check for every timm architecture whether it becomes a working spiking network. Prints a table per family, and
totals.

    python benchmarks/coverage.py                       # all architectures on the meta device, then 98 families on CPU
    python benchmarks/coverage.py --skip-meta --families resnet,swin_transformer
    python benchmarks/coverage.py --skip-meta --checks audited,injected --continue

families.csv is written after every model. --continue continues an interrupted run with the same checks.
Each check runs on the spiking model, and on the ANN if timm itself may fail it: 'upstream' marks such results.
"""
import argparse
import copy
import csv
import gc
import json
import multiprocessing
import time
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from random import Random
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import timm
import torch
import torch.nn as nn
from timm.models._registry import _model_to_module
from torch.utils._pytree import tree_leaves, tree_map

import timm_sscl  # registers the spiking_ names
from timm_sscl import SpikingNeuron, calibrate
from timm_sscl.conversion.finding.activations import is_activation
from timm_sscl.conversion.audit import audit
from timm_sscl.conversion.finding.policy import Policy
from timm_sscl.models.spiking import PREFIX
from timm_sscl.probing import probe_sizes
from timm_sscl.features.recorder import Recorder
from timm_sscl.features.finding import find_taps
from timm_sscl.features.tap import fold_feature
from timm_sscl.features.stages import stage_indices

T, B, CLASSES = 2, 2, 10

# the smallest architecture of every family; SHRUNK has arguments that shrink those that are still large
REPRESENTATIVES: Dict[str, str] = {
    'beit': 'beit_base_patch16_224', 'byoanet': 'halonet_h1', 'byobnet': 'test_byobnet', 'cait': 'cait_xxs24_224',
    'coat': 'coat_tiny', 'convit': 'convit_tiny', 'convmixer': 'convmixer_768_32', 'convnext': 'test_convnext',
    'cpubone': 'cpubone_nano', 'crossvit': 'crossvit_tiny_240', 'csatv2': 'csatv2', 'cspnet': 'cs3darknet_focus_s',
    'cspnext': 'cspnext_tiny', 'davit': 'davit_tiny', 'deepseek_vit': 'deepseek_vit_412m',
    'deit': 'deit_tiny_patch16_224', 'densenet': 'densenet121', 'dla': 'dla46x_c', 'dpn': 'dpn48b',
    'edgenext': 'edgenext_xx_small', 'efficientformer': 'efficientformer_l1',
    'efficientformer_v2': 'efficientformerv2_s0', 'efficientnet': 'test_efficientnet',
    'efficientvim': 'efficientvim_m1', 'efficientvit_mit': 'efficientvit_b0', 'efficientvit_msra': 'efficientvit_m0',
    'eva': 'vit_tiny_patch16_dinov3_qkvb', 'fasternet': 'fasternet_t0', 'fastvit': 'fastvit_t8',
    'focalnet': 'focalnet_tiny_srf', 'gcvit': 'gcvit_xxtiny', 'gemma4_vit': 'gemma4_vit_167m',
    'ghostnet': 'ghostnet_050', 'hardcorenas': 'hardcorenas_b', 'hgnet': 'hgnetv2_b0', 'hiera': 'hiera_tiny_224',
    'hieradet_sam2': 'sam2_hiera_tiny', 'hrnet': 'hrnet_w18_small', 'iformer': 'iformer_t',
    'inception_next': 'inception_next_atto', 'inception_resnet_v2': 'inception_resnet_v2',
    'inception_v3': 'inception_v3', 'inception_v4': 'inception_v4', 'lcnetv2': 'lcnetv2_small', 'levit': 'levit_128s',
    'lowformer': 'lowformer_b0', 'mambaout': 'test_mambaout', 'maxxvit': 'test_coatnet',
    'metaformer': 'poolformerv2_s12', 'mlp_mixer': 'gmlp_ti16_224', 'mobilenetv3': 'mobilenetv3_small_050',
    'mobilenetv5': 'mobilenetv5_base', 'mobilevit': 'mobilevit_xxs', 'mvitv2': 'mvitv2_tiny',
    'naflexvit': 'naflexvit_base_patch16_parfac_gap', 'nasnet': 'nasnetalarge', 'nest': 'nest_tiny',
    'nextvit': 'nextvit_small', 'nfnet': 'test_nfnet', 'pit': 'pit_ti_224', 'pnasnet': 'pnasnet5large',
    'pvt_v2': 'pvt_v2_b0', 'qwen3_vit': 'qwen3_vit_88m', 'rdnet': 'rdnet_tiny', 'regnet': 'regnetx_002',
    'repghost': 'repghostnet_050', 'repvit': 'repvit_m1', 'res2net': 'res2next50', 'resnest': 'resnest14d',
    'resnet': 'test_resnet', 'resnetv2': 'resnetv2_18', 'rexnet': 'rexnet_100', 'selecsls': 'selecsls42',
    'senet': 'legacy_seresnet18', 'sequencer': 'sequencer2d_s', 'shvit': 'shvit_s1', 'sknet': 'skresnet18',
    'starnet': 'starnet_s050', 'swiftformer': 'swiftformer_xs', 'swin_transformer': 'swin_tiny_patch4_window7_224',
    'swin_transformer_v2': 'swinv2_tiny_window8_256', 'swin_transformer_v2_cr': 'swinv2_cr_tiny_224',
    'tiny_vit': 'tiny_vit_5m_224', 'tnt': 'tnt_s_legacy_patch16_224', 'tresnet': 'tresnet_m',
    'twins': 'twins_svt_small', 'vgg': 'vgg11', 'visformer': 'visformer_tiny', 'vision_transformer': 'test_vit',
    'vision_transformer_hybrid': 'vit_tiny_r_s16_p8_224', 'vision_transformer_relpos': 'test_vit_relpos',
    'vision_transformer_sam': 'samvit_base_patch16_224', 'vitamin': 'vitamin_small_224', 'volo': 'volo_d1_224',
    'vovnet': 'ese_vovnet19b_slim_dw', 'xception': 'legacy_xception', 'xception_aligned': 'xception41p',
    'xcit': 'xcit_nano_12_p8_224',
}
HARD_CASES = (  # further architectures for what the smallest of a family does not cover
    'mobilevitv2_050', 'test_efficientnet_evos', 'resnetv2_50d_evos', 'resnetv2_50d_frn', 'deepseek_vit_412m_enc',
    'gemma4_vit_167m_enc', 'mobilenetv5_300m_enc', 'qwen3_vit_88m_enc', 'caformer_s18', 'seresnet18',
    'coatnet_rmlp_nano_rw_224', 'beitv2_base_patch16_224', 'vit_relpos_small_patch16_224',
    'deit_tiny_distilled_patch16_224',
)
SHRUNK: Dict[str, Dict[str, Any]] = {
    'deepseek_vit_412m': dict(depth=2, embed_dim=128, num_heads=2),
    'deepseek_vit_412m_enc': dict(depth=2, embed_dim=128, num_heads=2, img_size=112),
    'gemma4_vit_167m': dict(depth=2, position_embedding_size=256),
    'gemma4_vit_167m_enc': dict(depth=2, position_embedding_size=256),
    'beit_base_patch16_224': dict(depth=4, img_size=64),
    'beitv2_base_patch16_224': dict(depth=4, img_size=64),
    'samvit_base_patch16_224': dict(depth=4, img_size=64),
    'naflexvit_base_patch16_parfac_gap': dict(depth=4),
    'qwen3_vit_88m': dict(depth=4, img_size=128),
    'qwen3_vit_88m_enc': dict(depth=4, img_size=128),
    'mobilenetv5_300m_enc': dict(channel_multiplier=.25),
    'mobilenetv5_base': dict(channel_multiplier=.25),
    'cait_xxs24_224': dict(img_size=64, depth=6),
    'convit_tiny': dict(img_size=64),
    'deit_tiny_patch16_224': dict(img_size=64),
    'deit_tiny_distilled_patch16_224': dict(img_size=64),
    'vit_relpos_small_patch16_224': dict(img_size=64, depth=4),
    'swin_tiny_patch4_window7_224': dict(img_size=112),
    'swinv2_tiny_window8_256': dict(img_size=128),
    'swinv2_cr_tiny_224': dict(img_size=112),
    'nest_tiny': dict(img_size=112),
    'vitamin_small_224': dict(img_size=64),
    'xcit_nano_12_p8_224': dict(img_size=64),
    'pit_ti_224': dict(img_size=64),
    'vit_tiny_patch16_dinov3_qkvb': dict(img_size=64, depth=4),
    'vit_tiny_r_s16_p8_224': dict(img_size=64, depth=4),
}


class Result(NamedTuple):
    """Outcome of one check: 'yes', 'upstream' (timm's own model fails it, too) or 'no'."""
    outcome: str
    detail: str = ''


class Subject:
    """One architecture: the ANN, the spiking model with the same weights, and an input that both accept."""

    def __init__(self, name: str):
        self.name = name
        self.kwargs = SHRUNK.get(name, {})

    def create(self, prefix: str = '', **kwargs: Any) -> nn.Module:
        torch.manual_seed(0)
        classes = {} if name_has_no_head(self.name) else dict(num_classes=CLASSES)
        return timm.create_model(prefix + self.name, **classes, **self.kwargs, **kwargs)

    @cached_property
    def ann(self) -> nn.Module:
        return self.create()

    @cached_property
    def images(self) -> torch.Tensor:
        """Noise of the smallest size that the ANN accepts."""
        generator = torch.Generator().manual_seed(0)
        for size in probe_sizes(self.ann):
            images = torch.randn(B, *size, generator=generator)
            try:
                with torch.no_grad():
                    copy.deepcopy(self.ann).train()(images)
                return images
            except (RuntimeError, ValueError, AssertionError, IndexError):
                continue
        raise ValueError(f'{self.name} runs on none of {probe_sizes(self.ann)}')

    @cached_property
    def spiking(self) -> nn.Module:
        """The spiking model, calibrated, with running statistics of the images."""
        model = self.create(PREFIX, timesteps=T)
        model.load_state_dict(self.ann.state_dict(), strict=True)
        self.drives = wake(model, self.images)
        return model

    def batch(self, size: int) -> torch.Tensor:
        """Return `size` images of noise."""
        return torch.randn(size, *self.images.shape[1:], generator=torch.Generator().manual_seed(2))


def wake(model: nn.Module, images: torch.Tensor) -> List[Any]:
    """Calibrate a spiking model and set its norms' statistics to those of the images; return the LayerDrives."""
    drives = calibrate(model, images).spiking_report().drives
    momenta = {m: m.momentum for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    for norm in momenta:
        norm.momentum = 1.
    with torch.no_grad():
        model.train()(images)
    for norm, momentum in momenta.items():
        norm.momentum = momentum
    return drives


def name_has_no_head(name: str) -> bool:
    return name.endswith('_enc')


def logits(out: Any) -> torch.Tensor:
    """Return one tensor. Some models return a tuple in training (distilled heads), encoders a feature map."""
    out = sum(out) if isinstance(out, (tuple, list)) and len({o.shape for o in out}) == 1 else out
    return torch.cat([o.flatten(1) for o in out], 1) if isinstance(out, (tuple, list)) else out


def loss(out: Any) -> torch.Tensor:
    out = logits(out)
    return (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)).sum()


def grads(model: nn.Module, images: torch.Tensor) -> Dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model.zero_grad()
    loss(model.train()(images)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---- the checks

def converts(s: Subject) -> Result:
    report = s.spiking.spiking_report()
    return Result('yes', f'{len(report.neurons)} layers, {len(report.analog)} analog')


@torch.no_grad()
def forward(s: Subject) -> Result:
    model, expected = s.spiking.eval(), s.ann.eval()(s.images[:1])
    expected = expected if isinstance(expected, torch.Tensor) else logits(expected)
    out, steps = model(s.images), model(s.images, per_step=True)
    if logits(out).shape[1:] != expected.shape[1:] or steps.shape[:2] != (T, B):
        return Result('no', f'{tuple(logits(out).shape)} instead of {tuple(expected.shape)}')
    if not name_has_no_head(s.name):
        parts = model.forward_head(model.forward_features(s.images))
        if not torch.equal(logits(parts), logits(out)):
            return Result('no', 'forward is not forward_head(forward_features)')
    return Result('yes')


def backward(s: Subject) -> Result:
    own, wanted = grads(s.spiking, s.images), grads(s.ann, s.images)
    gone = {name for name, module in s.spiking.named_modules() if getattr(module, 'forgotten', ())}
    missing = [n for n in wanted if n not in own and n.rpartition('.')[0] not in gone]
    infinite = [n for n, g in own.items() if not g.isfinite().all()]
    return (Result('no', f'no gradient {missing[:3]}, not finite {infinite[:3]}') if missing or infinite
            else Result('yes'))


@torch.no_grad()
def binary(s: Subject) -> Result:
    bad = []
    handles = [lif.register_forward_hook(
        lambda m, args, out, n=n: bad.append(n) if not ((out == 0) | (out == 1)).all() else None)
        for n, lif in s.spiking.neurons().items()]
    s.spiking.train()(s.images)
    s.spiking.eval()(s.images)
    for handle in handles:
        handle.remove()
    return Result('no', ', '.join(bad[:3])) if bad else Result('yes')


def apart(model: nn.Module, run: Callable[[nn.Module, torch.Tensor], Any], images: torch.Tensor) -> Result:
    """Check that a batch gives the same as its samples (float64, evaluation mode), for batches of 1, T and an odd
    number.

    Args:
        model: Spiking model.
        run: Entry point, (model, images) -> tensors (B, ...).
        images: 2 T images.
    """
    model, images = copy.deepcopy(model).double().eval(), images.double()
    whole = tree_leaves(run(model, images))
    spread = [(w[0] - w[1]).abs().max().item() for w in whole]
    worst = 0.
    for size in (1, T, T + 1):
        for w, part, scale in zip(whole, tree_leaves(run(model, images[:size])), spread):
            if part.shape != (size, *w.shape[1:]):
                return Result('no', f'{tuple(part.shape)} for a batch of {size}, T={T}')
            worst = max(worst, (w[:size] - part).abs().max().item() / (scale or 1.))
    if not any(spread):
        return Result('no', 'the same for every image')
    # sums in another order; a flipped spike or a wrong timestep shows at 1e-3 of the difference between two images
    return Result('yes' if worst < 1e-8 else 'no', f'{worst:.1e}')


def by_sample(features: Any) -> Any:
    """Reshape (T * B, ...) tensors to (B, T, ...)."""
    return tree_map(lambda x: x.unflatten(0, (T, -1)).transpose(0, 1), features)


@torch.no_grad()
def apart_forward(s: Subject) -> Result:
    return apart(s.spiking, lambda model, x: model(x), s.batch(2 * T))


@torch.no_grad()
def apart_features(s: Subject) -> Result:
    """Check forward_features, and forward_head of its output."""
    def run(model: nn.Module, x: torch.Tensor) -> Any:
        features = model.forward_features(x)
        return by_sample(features), [] if name_has_no_head(s.name) else model.forward_head(features)
    return apart(s.spiking, run, s.batch(2 * T))


@torch.no_grad()
def apart_intermediates(s: Subject) -> Result:
    def run(model: nn.Module, x: torch.Tensor) -> Any:
        final, maps = model.forward_intermediates(x)
        return by_sample(final), maps
    return apart(s.spiking, run, s.batch(2 * T))


def live(s: Subject) -> Result:
    """Check that every neuron layer fires and gets a gradient in training mode."""
    model, got = s.spiking, set()
    handles = [lif.register_full_backward_hook(lambda m, gi, go, n=n: got.add(n) if gi[0].any() else None)
               for n, lif in model.neurons().items()]
    grads(model, s.images)
    for handle in handles:
        handle.remove()
    dead = [d.name for d in s.drives if d.rate == 0] + [n for n in model.neurons() if n not in got]
    dead += [n for n in model.neurons() if n not in {d.name for d in s.drives}]
    rates = sorted(d.rate for d in s.drives)
    if not dead:
        return Result('yes', f'rates {rates[0]:.2f} to {rates[-1]:.2f}')
    upstream = zero_inputs(s.ann, s.images)
    excused = set(dead) <= upstream
    return Result('upstream' if excused else 'no', f'{len(set(dead))} layers ({dead[0]})'
                  + (' whose input is zero in the ANN too' if excused else ''))


@torch.no_grad()
def zero_inputs(ann: nn.Module, images: torch.Tensor) -> set:
    """Return the modules of the ANN whose input is all zeros."""
    zero = set()
    handles = [m.register_forward_pre_hook(lambda m, a, n=n: zero.add(n) if a and isinstance(a[0], torch.Tensor)
                                           and not a[0].any() else None) for n, m in ann.named_modules()]
    ann.train()(images)
    for handle in handles:
        handle.remove()
    return zero


def taps(s: Subject) -> Result:
    """Check that hooks record what forward_intermediates(per_step=True) returns, without and with checkpointing."""
    if name_has_no_head(s.name):
        return Result('upstream', 'no pooled feature: an encoder without a head')
    model = copy.deepcopy(s.spiking)
    found = find_taps(model, input_size=s.images.shape[1:])
    model.train()
    for module in model.modules():  # so that running statistics and dropout do not differ
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or 'Drop' in type(module).__name__:
            module.eval()
    if hasattr(model, 'drop_rate'):
        model.drop_rate = 0.
    # with gradients as below: fused attention uses other kernels without, and rounding flips spikes
    final, stages = model.forward_intermediates(s.images, indices=stage_indices(model), per_step=True)
    expected = [*stages, model.forward_head(final, pre_logits=True, per_step=True)]
    for checkpointing in (False, True):
        if checkpointing and not set_checkpointing(model):
            break
        recorder = Recorder(model, found)
        with _inputs_of_neurons(model, [tap.module for tap in found]) as currents:
            model(s.images)
        seen = [fold_feature(x, T, tap.channel_axis, tap.prefix_tokens)
                for tap, x in zip(found, recorder.take(s.images))]
        recorder.close()
        for tap, x, y in zip(found, seen, expected):
            # a stage whose output is not spikes is read at the neuron that takes it
            if not _equal(x, y) and not _equal(currents.get(tap.module), y):
                return Result('no', f'{tap.module} is not {tap.name}')
    return Result('yes', f'{len(found)} taps')


def _equal(x: Optional[torch.Tensor], y: torch.Tensor) -> bool:
    return x is not None and x.numel() == y.numel() and torch.allclose(x.reshape(y.shape), y, rtol=1e-4, atol=1e-5)


@contextmanager
def _inputs_of_neurons(model: nn.Module, names: Sequence[str]) -> Iterator[Dict[str, torch.Tensor]]:
    """Collect the inputs of those of these modules that are neurons, by name."""
    inputs: Dict[str, torch.Tensor] = {}

    def hook(name: str, module: nn.Module, args: Tuple[Any, ...]) -> None:
        inputs[name] = args[0]

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_pre_hook(partial(hook, name))
               for name in names if isinstance(modules[name], SpikingNeuron)]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def set_checkpointing(model: nn.Module) -> bool:
    try:
        model.set_grad_checkpointing(True)
    except (AssertionError, AttributeError, NotImplementedError, RuntimeError):
        return False
    return True


@torch.no_grad()
def features_only(s: Subject) -> Result:
    try:
        expected = s.create(features_only=True).eval()(s.images)
    except Exception as error:  # timm raises many types if a family has no such form
        return Result('upstream', f'{type(error).__name__}: {error}'[:80])
    maps = s.create(PREFIX, timesteps=T, features_only=True).eval()(s.images)
    same = [m.shape for m in maps] == [m.shape for m in expected]
    return Result('yes' if same else 'no', f'{len(maps)} maps')


def apart_features_only(s: Subject) -> Result:
    if features_only(s).outcome == 'upstream':
        return Result('upstream', 'no such form')
    model = s.create(PREFIX, timesteps=T, features_only=True)
    wake(model, s.images)
    with torch.no_grad():
        return apart(model, lambda model, x: list(model(x)), s.batch(2 * T))


def checkpointing(s: Subject) -> Result:
    if not set_checkpointing(copy.deepcopy(s.ann)):
        return Result('upstream', 'not supported')
    checkpointed = copy.deepcopy(s.spiking)
    set_checkpointing(checkpointed)
    first, second = grads(s.spiking, s.images), grads(checkpointed, s.images)
    scale = max(g.abs().max().item() for g in first.values())
    # the same float32 arithmetic; only sums of gradients may have another order
    different = [n for n in first if n not in second or (first[n] - second[n]).abs().max() > 1e-5 * scale]
    return Result('no', ', '.join(different[:3])) if different else Result('yes')


def audited(s: Subject) -> Result:
    """Check that one forward shows no unexplained nonlinearity, and that the table of timm's classes agrees."""
    found = audit(s.spiking, s.spiking._report, Policy(s.spiking, None, None))
    listed = {record.name for record in s.spiking.spiking_report()}
    missing = [finding.name for finding in found.findings if finding.name not in listed]
    if found.unknown or missing or found.status.startswith('pending'):
        return Result('no', '; '.join([*(f.reason for f in found.unknown[:3]), *missing[:3], found.status]))
    return Result('yes', f'{len(found.findings)} operations explained')


INJECTED: Dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    'clamp': lambda x: x.clamp(min=0),
    'silu': lambda x: x * torch.sigmoid(x),
    'gelu': lambda x: .5 * x * (1 + torch.tanh(.79788 * (x + .044715 * x ** 3))),
}


def injected(s: Subject) -> Result:
    """Check that a hand-written activation after a random layer is refused, with the name of the layer."""
    model, missed = s.create(), []
    analog = [record.name for record in s.spiking.spiking_report() if record.now == record.was]
    layers = [name for name in layers_that_see(model, s.images)
              if not any(name == other or name.startswith(f'{other}.') for other in analog)]
    random = Random(s.name)
    for kind, function in INJECTED.items():
        name = random.choice(layers)
        layer = model.get_submodule(name)
        forward = layer.forward
        layer.forward = lambda *args, **kwargs: function(forward(*args, **kwargs))
        try:
            timm_sscl.convert_to_spiking(model, timesteps=T)
        except ValueError as error:
            if f' in {name}\n' not in str(error) and f' in {name} (' not in str(error):
                missed.append(f'{kind} in {name}: {error}')
        else:
            return Result('no', f'{kind} in {name} was converted in silence')
        del layer.forward
    return Result('no', '; '.join(missed)) if missed else Result('yes')


@torch.no_grad()
def layers_that_see(model: nn.Module, images: torch.Tensor) -> List[str]:
    """Return the layers with weights whose output is a tensor that depends on the images (a position bias table does
    not).
    """
    model = copy.deepcopy(model).eval()
    outputs: Dict[str, List[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if name and not list(module.children()) and list(module.parameters()) and not is_activation(module):
            module.register_forward_hook(
                lambda m, args, out, name=name: outputs.setdefault(name, []).append(out.clone())
                if isinstance(out, torch.Tensor) else None)
    model(images)
    first, outputs = outputs, {}
    model(images.flip(-1) + 1)
    return [name for name in first if any(not torch.equal(a, b) for a, b in zip(first[name], outputs[name]))]


CHECKS: Dict[str, Callable[[Subject], Result]] = {
    check.__name__: check
    for check in (converts, forward, backward, binary, live, taps, features_only, checkpointing, apart_forward,
                  apart_features, apart_intermediates, apart_features_only, audited, injected)}


# ---- running the checks

def run_family(task: Tuple[str, str], checks: Sequence[str] = tuple(CHECKS)) -> Dict[str, Any]:
    """Run checks on one architecture, all by default."""
    torch.set_num_threads(1)
    family, name = task
    subject, row, began = Subject(name), dict(family=family, model=name), time.time()
    for check in checks:
        try:
            row[check], row[f'{check}_detail'] = CHECKS[check](subject)
        except Exception as error:  # a check that cannot run counts as failed
            row[check], row[f'{check}_detail'] = 'no', f'{type(error).__name__}: {error}'[:200]
    row['seconds'] = round(time.time() - began, 1)
    gc.collect()
    return row


def run_meta(name: str) -> Dict[str, Any]:
    """Build and convert one architecture on the meta device."""
    row = dict(family=_model_to_module[name], model=name)
    try:
        with torch.device('meta'):
            model = timm.create_model(PREFIX + name)
        devices = {p.device.type for p in model.parameters()}
        neurons = len(model.neurons())
        row.update(neurons=neurons, analog=len(model.spiking_report().analog), ok=devices == {'meta'} and neurons > 0)
    except Exception as error:
        row.update(ok=False, detail=f'{type(error).__name__}: {error}'[:200])
    return row


def run_all(function: Callable, tasks: List[Any], jobs: int, what: str, keep: Callable) -> List[Dict[str, Any]]:
    """Map with progress, and call keep(rows) after each result, so that an interrupted run keeps its results."""
    rows, began = [], time.time()
    with multiprocessing.get_context('fork').Pool(jobs, maxtasksperchild=32) as pool:
        for row in pool.imap_unordered(function, tasks, chunksize=1):
            rows.append(row)
            keep(rows)
            if len(rows) % max(1, len(tasks) // 25) == 0 or len(rows) == len(tasks):
                rate = len(rows) / (time.time() - began)
                eta = timedelta(seconds=round((len(tasks) - len(rows)) / rate))
                print(f'{what} {len(rows):>4}/{len(tasks)}  {rate:.2f}/s  ETA {eta}', flush=True)
    return sorted(rows, key=lambda row: (row['family'], row['model']))


def print_table(rows: List[Dict[str, Any]], checks: Sequence[str]) -> None:
    width = max(len(row['model']) for row in rows)
    family_width = max(len(row['family']) for row in rows)
    print(f'\n{"family":<{family_width}}  {"model":<{width}}  ' + '  '.join(checks))
    for row in rows:
        print(f'{row["family"]:<{family_width}}  {row["model"]:<{width}}  '
              + '  '.join(f'{row[check]:<{len(check)}}' for check in checks))
    for row in rows:
        for check in checks:
            if row[check] != 'yes':
                print(f'{row[check]}: {row["model"]}, {check}: {row[f"{check}_detail"]}')


def totals(rows: List[Dict[str, Any]], checks: Sequence[str]) -> Dict[str, str]:
    """Return 'yes + upstream of all' families per check. A family counts if all its models pass."""
    families = sorted({row['family'] for row in rows})
    result = {}
    for check in checks:
        by_family = {f: [row[check] for row in rows if row['family'] == f] for f in families}
        good = sum(all(o == 'yes' for o in outcomes) for outcomes in by_family.values())
        excused = sum('no' not in outcomes and 'upstream' in outcomes for outcomes in by_family.values())
        result[check] = f'{good + excused} of {len(families)}' + (f' ({excused} as upstream)' if excused else '')
    return result


def write_csv(file: Path, rows: List[Dict[str, Any]]) -> None:
    fields = list(dict.fromkeys(key for row in rows for key in row))
    with file.open('w', newline='') as stream:
        writer = csv.DictWriter(stream, fields)
        writer.writeheader()
        writer.writerows(rows)


def read_csv(file: Path, checks: Sequence[str]) -> List[Dict[str, Any]]:
    """Return the rows of an interrupted run that have all the checks."""
    if not file.is_file():
        return []
    with file.open(newline='') as stream:
        return [row for row in csv.DictReader(stream) if all(row.get(check) for check in checks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--families', help='comma-separated timm modules (default: all)')
    parser.add_argument('--skip-meta', action='store_true', help='leave out the pass over all architectures')
    parser.add_argument('--checks', help=f'comma-separated (default: all; {", ".join(CHECKS)})')
    parser.add_argument('--continue', dest='go_on', action='store_true', help='keep the rows of families.csv')
    parser.add_argument('--jobs', type=int, default=2, help='processes, one thread each (default: 2)')
    parser.add_argument('--output', type=Path, default=Path('output/coverage'), help='folder for CSV and JSON')
    args = parser.parse_args()
    own = {'resnet_cifar', 'vgg_cifar'}
    names = [n for n in timm.list_models() if not n.startswith(PREFIX) and _model_to_module[n] not in own]
    families = args.families.split(',') if args.families else sorted({_model_to_module[n] for n in names})
    unknown = [f for f in families if f not in REPRESENTATIVES]
    if unknown:
        parser.error(f'--families: no representative for {", ".join(unknown)}; there are {", ".join(REPRESENTATIVES)}')
    checks = args.checks.split(',') if args.checks else list(CHECKS)
    if not set(checks) <= set(CHECKS):
        parser.error(f'--checks {args.checks}: there are {", ".join(CHECKS)}')
    args.output.mkdir(parents=True, exist_ok=True)
    began, summary = time.time(), dict(timm=timm.__version__, torch=torch.__version__)
    if not args.skip_meta:
        meta = run_all(run_meta, names, args.jobs, 'meta', partial(write_csv, args.output / 'meta.csv'))
        for row in meta:
            if not row['ok']:
                print(f'no: {row["model"]}: {row.get("detail", "nothing spikes")}')
        summary['meta'] = f'{sum(row["ok"] for row in meta)} of {len(meta)}'
    tasks = [(f, REPRESENTATIVES[f]) for f in families]
    tasks += [(_model_to_module[n], n) for n in HARD_CASES if _model_to_module[n] in families]
    file = args.output / 'families.csv'
    kept = read_csv(file, checks) if args.go_on else []
    tasks = [(family, name) for family, name in tasks if name not in {row['model'] for row in kept}]
    rows = kept + run_all(partial(run_family, checks=checks), tasks, args.jobs, 'families',
                          lambda rows: write_csv(file, kept + rows))
    rows.sort(key=lambda row: (row['family'], row['model']))
    print_table(rows, checks)
    summary.update(totals(rows, checks), models=len(rows), seconds=round(time.time() - began))
    (args.output / 'summary.json').write_text(json.dumps(summary, indent=2) + '\n')
    print()
    for key, value in summary.items():
        print(f'{key:<14} {value}')
    print(f'{"files":<14} {args.output}/families.csv, meta.csv, summary.json')


if __name__ == '__main__':
    main()
