"""The ResNet20 of the SSCL paper's CIFAR experiments (11.2 M parameters; not He's 0.27 M one), as a timm model."""
from typing import Any, Tuple

import torch.nn as nn

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet

__all__ = ['ResNetCifar', 'resnet20_cifar']


class ResNetCifar(ResNet):
    """timm's ResNet with a stem for small images: three 3x3 convolutions at full resolution, then average pooling by 2.

    Blocks are timm's, with average-pool shortcuts (avg_down) and the last norm of a block starting at zero.

    Args:
        width: Channels of the stem and the first stage (even), doubled at every further stage.
        layers: Blocks per stage.
        in_chans: Input channels.
        **kwargs: Further arguments of timm's ResNet.
    """

    def __init__(self, width: int = 64, layers: Tuple[int, ...] = (2, 2, 2, 2), in_chans: int = 3, **kwargs: Any):
        if width < 2 or width % 2:
            raise ValueError(f'width={width}: must be an even number of channels.')
        channels = tuple(width * 2 ** i for i in range(len(layers)))
        # a deep stem of width / 2 makes timm's first stage expect `width` channels
        super().__init__(
            BasicBlock, layers, in_chans=in_chans, channels=channels, stem_type='deep', stem_width=width // 2,
            avg_down=True, **kwargs)
        self._small_stem(width, in_chans)

    def _small_stem(self, width: int, in_chans: int) -> None:
        norm, act = type(self.bn1), type(self.act1)
        stem = []
        for i, chans in enumerate((in_chans, width, width)):
            conv = nn.Conv2d(chans, width, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode='fan_out', nonlinearity='relu')
            stem += [conv] if i == 2 else [conv, norm(width), act(inplace=True)]
        self.conv1 = nn.Sequential(*stem)
        self.bn1 = norm(width)
        self.maxpool = nn.AvgPool2d(2)
        for info, reduction in zip(self.feature_info, (1, 2, 4, 8, 16)):
            info['reduction'] = reduction
        self.feature_info[0]['num_chs'] = width


def _cfg(**kwargs: Any):
    return {
        'num_classes': 100, 'input_size': (3, 32, 32), 'pool_size': (2, 2), 'crop_pct': 1.0, 'interpolation': 'bicubic',
        'mean': (0.5071, 0.4867, 0.4408), 'std': (0.2675, 0.2565, 0.2761), 'first_conv': 'conv1.0', 'classifier': 'fc',
        **kwargs,
    }


default_cfgs = generate_default_cfgs({'resnet20_cifar.untrained': _cfg()})


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
    """ResNet20 of the paper's line: three stem convolutions, stages of [2, 2, 2, 2] basic blocks at 64/128/256/512."""
    return build_model_with_cfg(ResNetCifar, 'resnet20_cifar', pretrained, **kwargs)
