"""VGG16 of the SSCL paper's CIFAR experiments as a timm model."""
from typing import Any, List, Optional, Tuple, Union

import torch
import torch.nn as nn

from timm.layers import ClassifierHead, get_device_dtype
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.vgg import VGG

__all__ = ['VGGCifar', 'vgg16_cifar']

_CONFIGURATION_D = (1, 1, 'M', 2, 2, 'M', 4, 4, 4, 'M', 8, 8, 8, 'M', 8, 8, 8, 'M')  # channels as multiples of width


class VGGCifar(VGG):
    """timm's VGG16 with batch norm, average pooling, and one linear classifier after global average pooling.

    Args:
        width: Channels of the first convolutions; 64 is VGG16.
        num_classes: Number of classes.
        global_pool: Pooling before the classifier.
        drop_rate: Dropout before the classifier.
        **kwargs: Further arguments of timm's VGG.
    """

    def __init__(
            self,
            width: int = 64,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            norm_layer: Any = nn.BatchNorm2d,
            **kwargs: Any,
    ):
        if width < 1:
            raise ValueError(f'width={width}: must be 1 channel or more.')
        configuration = [v if v == 'M' else v * width for v in _CONFIGURATION_D]
        # timm's two layers of 4096 units are replaced below; a hidden size of 1 keeps them small until then
        super().__init__(configuration, norm_layer=norm_layer, mlp_ratio=1 / 4096, **kwargs)
        for i, layer in enumerate(self.features):
            if isinstance(layer, nn.MaxPool2d):
                self.features[i] = nn.AvgPool2d(2)
        self.num_classes, self.drop_rate = num_classes, drop_rate
        self.add_module('pre_logits', nn.Identity())
        self.head = ClassifierHead(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features
        if num_classes > 0:
            nn.init.normal_(self.head.fc.weight, 0, 0.01)
            nn.init.zeros_(self.head.fc.bias)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the outputs of the stages for the backward."""
        self.grad_checkpointing = enable

    def _stages(self) -> List[List[nn.Module]]:
        """Return the layers of each stage, which ends with its last activation (the last stage with its pooling)."""
        layers = list(self.features)
        ends = [0] + [end + 1 for end in self.feature_ends if end < len(layers)]
        return [layers[begin:end] for begin, end in zip(ends, ends[1:])]

    def _run_stage(self, layers: List[nn.Module], x: torch.Tensor) -> torch.Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(layers, x, every=len(layers))
        for layer in layers:
            x = layer(x)
        return x

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        for layers in self._stages():
            x = self._run_stage(layers, x)
        return x

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Run timm's forward_intermediates with gradient checkpointing."""
        assert output_fmt in ('NCHW',), 'Output shape must be NCHW.'
        take_indices, max_index = feature_take_indices(len(self.feature_ends), indices)
        stages = self._stages()
        intermediates = []
        for i, layers in enumerate(stages[:max_index + 1] if stop_early else stages):
            x = self._run_stage(layers, x)
            if i in take_indices:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)


default_cfgs = generate_default_cfgs({
    'vgg16_cifar.untrained': {
        'num_classes': 100, 'input_size': (3, 32, 32), 'pool_size': (1, 1), 'crop_pct': 1.0, 'interpolation': 'bicubic',
        'mean': (0.5071, 0.4867, 0.4408), 'std': (0.2675, 0.2565, 0.2761), 'first_conv': 'features.0',
        'classifier': 'head.fc',
    },
})


@register_model
def vgg16_cifar(pretrained: bool = False, **kwargs: Any) -> VGGCifar:
    """VGG16 for small images: configuration D with batch norm, five average poolings, one linear classifier."""
    feature_cfg = dict(flatten_sequential=True, out_indices=(0, 1, 2, 3, 4, 5))
    return build_model_with_cfg(VGGCifar, 'vgg16_cifar', pretrained, feature_cfg=feature_cfg, **kwargs)
