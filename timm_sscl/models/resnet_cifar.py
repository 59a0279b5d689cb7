"""ResNets of the SSCL paper's CIFAR and CIFAR10-DVS experiments as timm models.

ResNet20 has 11.2 M parameters, as in related SNN papers; it is not He's ResNet20 with 0.27 M. ResNet19 is the one of
tdBN (Zheng et al. 2020).
"""
from typing import Any, List, Optional, Tuple, Union

import torch
import torch.nn as nn

from timm.layers import NormMlpClassifierHead, get_device_dtype
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.resnet import BasicBlock, ResNet

__all__ = ['ResNetCifar', 'ResNetCifarMlp', 'resnet19_cifar', 'resnet19_cifar_fc', 'resnet20_cifar']

_MAX_STAGES = 4  # timm's ResNet has layer1 to layer4


class ResNetCifar(ResNet):
    """timm's ResNet with a stem for small images: 3x3 convolutions at full resolution, then optional average pooling.

    Args:
        width: Channels of the stem and the first stage (even); doubled in every further stage.
        layers: Blocks per stage, at most four stages.
        in_chans: Input channels.
        stem_convs: Number of 3x3 convolutions in the stem. Norm and activation follow each.
        stem_reduction: Average pooling at the end of the stem; 1 for none.
        **kwargs: Further arguments of timm's ResNet.
    """

    def __init__(
            self,
            width: int = 64,
            layers: Tuple[int, ...] = (2, 2, 2, 2),
            in_chans: int = 3,
            stem_convs: int = 3,
            stem_reduction: int = 2,
            **kwargs: Any,
    ):
        if width < 2 or width % 2:
            raise ValueError(f'width={width}: must be an even number of channels.')
        channels = tuple(width * 2 ** i for i in range(len(layers)))
        block: Any = BasicBlock  # timm's annotation is that of an instance
        # a deep stem of width / 2 gives timm's first stage `width` input channels
        super().__init__(
            block, layers, in_chans=in_chans, channels=channels, stem_type='deep', stem_width=width // 2, **kwargs)
        # timm's forward runs four stages; missing ones are empty, as after its pruning
        for i in range(len(layers), _MAX_STAGES):
            self.add_module(f'layer{i + 1}', nn.Sequential())
        self._small_stem(width, in_chans, stem_convs, stem_reduction)

    def _small_stem(self, width: int, in_chans: int, convs: int, reduction: int) -> None:
        """Replace timm's stem by 3x3 convolutions and average pooling, and correct feature_info."""
        norm, act, dd = type(self.bn1), type(self.act1), get_device_dtype(self)
        stem: List[nn.Module] = []
        for i in range(convs):
            conv = nn.Conv2d(width if i else in_chans, width, 3, padding=1, bias=False, **dd)
            nn.init.kaiming_normal_(conv.weight, mode='fan_out', nonlinearity='relu')
            stem += [conv] if i + 1 == convs else [conv, norm(width, **dd), act(inplace=True)]
        self.add_module('conv1', stem[0] if convs == 1 else nn.Sequential(*stem))
        self.bn1 = norm(width, **dd)
        self.add_module('maxpool', nn.AvgPool2d(reduction) if reduction > 1 else nn.Identity())
        self.feature_info[0]['num_chs'] = width
        self.feature_info[0]['reduction'] = 1
        for i, info in enumerate(self.feature_info[1:]):
            info['reduction'] = reduction * 2 ** i

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            *args: Any,
            **kwargs: Any,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Run timm's forward_intermediates with indices that count the existing stages: the stem, layer1, ..."""
        take_indices, _ = feature_take_indices(len(self.feature_info), indices)
        return super().forward_intermediates(x, take_indices, *args, **kwargs)

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Prune as timm does. Indices are those of forward_intermediates."""
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        if max_index < len(self.feature_info) - 1:
            return super().prune_intermediate_layers(take_indices, prune_norm, prune_head)
        if prune_head:
            self.reset_classifier(0, '')
        return take_indices


class ResNetCifarMlp(ResNetCifar):
    """ResNetCifar with a hidden layer in its head: global pooling, FC, activation, FC.

    forward_head(pre_logits=True) returns the hidden layer. Its activation becomes a neuron in a conversion.

    Args:
        hidden_size: Units of the hidden layer.
        num_classes: Number of classes.
        global_pool: Pooling before the head.
        drop_rate: Dropout before the classifier.
        **kwargs: Further arguments of ResNetCifar.
    """

    def __init__(
            self,
            hidden_size: int = 256,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            **kwargs: Any,
    ):
        super().__init__(num_classes=num_classes, global_pool=global_pool, drop_rate=drop_rate, **kwargs)
        del self.global_pool, self.fc
        self.head = NormMlpClassifierHead(
            self.num_features, num_classes, hidden_size=hidden_size, pool_type=global_pool, drop_rate=drop_rate,
            norm_layer=nn.Identity, act_layer=type(self.act1), **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features

    @torch.jit.ignore
    def get_classifier(self, name_only: bool = False) -> Union[str, nn.Module]:
        return 'head.fc' if name_only else self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None, reset_other: bool = False) -> None:
        """Reset the classifier; the hidden layer stays.

        Args:
            num_classes: Number of classes, 0 for none.
            global_pool: Pooling; None keeps it.
            reset_other: Whether to drop the hidden layer.
        """
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, reset_other, in_features=self.num_features)
        self.head_hidden_size = self.head.num_features

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Prune as timm does. The hidden layer, whose size depends on the last stage, is removed with the head."""
        _, max_index = feature_take_indices(len(self.feature_info), indices)
        if prune_head or max_index < len(self.feature_info) - 1:
            self.head.reset(self.num_classes, reset_other=True)
        return super().prune_intermediate_layers(indices, prune_norm, prune_head)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Return logits, or the hidden layer with pre_logits=True."""
        return self.head(x, pre_logits=pre_logits)


def _cfg(**kwargs: Any):
    return {
        'num_classes': 100, 'input_size': (3, 32, 32), 'pool_size': (2, 2), 'crop_pct': 1.0, 'interpolation': 'bicubic',
        'mean': (0.5071, 0.4867, 0.4408), 'std': (0.2675, 0.2565, 0.2761), 'first_conv': 'conv1', 'classifier': 'fc',
        **kwargs,
    }


default_cfgs = generate_default_cfgs({
    'resnet20_cifar.untrained': _cfg(first_conv='conv1.0'),
    'resnet19_cifar.untrained': _cfg(pool_size=(8, 8)),
    'resnet19_cifar_fc.untrained': _cfg(pool_size=(8, 8), classifier='head.fc'),
})

_RESNET19 = dict(width=128, layers=(3, 3, 2), stem_convs=1, stem_reduction=1, zero_init_last=False)


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
    """ResNet20 of related SNN papers: three stem convolutions, stages of [2, 2, 2, 2] basic blocks with 64/128/256/512
    channels.

    Shortcuts are average pooling and a 1x1 convolution. The scale of the last norm in a block starts at zero.
    """
    return build_model_with_cfg(ResNetCifar, 'resnet20_cifar', pretrained, **{'avg_down': True, **kwargs})


@register_model
def resnet19_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
    """ResNet19: one stem convolution, stages of [3, 3, 2] basic blocks with 128/256/512 channels, strides 1, 2, 2."""
    feature_cfg = dict(out_indices=(0, 1, 2, 3))
    return build_model_with_cfg(
        ResNetCifar, 'resnet19_cifar', pretrained, feature_cfg=feature_cfg, **{**_RESNET19, **kwargs})


@register_model
def resnet19_cifar_fc(pretrained: bool = False, **kwargs: Any) -> ResNetCifarMlp:
    """ResNet19 with a hidden layer of 256 units in its head, as in most public code."""
    feature_cfg = dict(out_indices=(0, 1, 2, 3))
    return build_model_with_cfg(
        ResNetCifarMlp, 'resnet19_cifar_fc', pretrained, feature_cfg=feature_cfg, **{**_RESNET19, **kwargs})
