"""Images of a trial on the device, and the order, crops and flips of an epoch from its seed alone."""
from functools import lru_cache
from pathlib import Path
from typing import Dict, Mapping, NamedTuple, Tuple

import numpy as np
import torch
import torch.nn.functional as F

from cifar_arrays import ImageSet, load_set

__all__ = ['DeviceSet', 'EpochBuffers', 'draw_epoch', 'load_device_set']

PAD = 4  # pixels on every side before the random crop
CUTOUT = 16  # side of the square that strong augmentation blanks
MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)  # of CIFAR-100, as in the networks' pretrained_cfg


class DeviceSet:
    """A set's images on a device: padded uint8 images to train on, and normalised images to evaluate on.

    Args:
        images: The set.
        device: Where its tensors lie.
        eval_batch: Images per evaluation step. The images are repeated up to a multiple of it.
    """

    def __init__(self, images: ImageSet, device: torch.device, eval_batch: int = 500):
        self.classes = images.classes
        self.eval_batch = eval_batch
        self.mean, self.std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, STD))
        train, labels = images.parts['train']
        pixels = torch.from_numpy(train).permute(0, 3, 1, 2).to(device)
        self.size = pixels.shape[-1]
        self.train = F.pad(pixels, (PAD,) * 4).contiguous()
        self.labels = torch.from_numpy(labels).to(device)
        self.sizes: Dict[str, int] = {}
        self.evaluated: Dict[str, Tuple[torch.Tensor, torch.Tensor]] = {}
        for part in ('validation', 'heldout'):
            values, targets = images.parts[part]
            self.sizes[part] = len(targets)
            if len(targets):
                index = np.arange(-(-len(targets) // eval_batch) * eval_batch) % len(targets)
                self.evaluated[part] = (
                    torch.from_numpy(values[index]).permute(0, 3, 1, 2).contiguous().to(device),
                    torch.from_numpy(targets[index]).to(device))
        self._places = torch.arange(self.size, device=device)
        self._channels = torch.arange(3, device=device).view(1, 3, 1, 1)

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Convert uint8 images (N, 3, H, W) to the network's input."""
        return (pixels.float() / 255 - self.mean) / self.std

    def crop(self, index: torch.Tensor, draws: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return training images, cropped, flipped and normalised: (B, 3, H, W).

        Args:
            index: Which training images, (B,).
            draws: Upper left corner 'y', 'x' in the padded image, and 'flip', (B,) each.
        """
        rows = draws['y'].view(-1, 1) + self._places
        columns = torch.where(draws['flip'].view(-1, 1) > 0, self.size - 1 - self._places, self._places)
        columns = draws['x'].view(-1, 1) + columns
        pixels = self.train[index.view(-1, 1, 1, 1), self._channels, rows[:, None, :, None], columns[:, None, None, :]]
        return self.normalise(pixels)

    def cut(self, images: torch.Tensor, draws: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Blank a square of every image, whose centre is 'cut_y', 'cut_x'."""
        near = [(self._places - draws[name].view(-1, 1)).abs() < CUTOUT // 2 for name in ('cut_y', 'cut_x')]
        return images * ~(near[0][:, None, :, None] & near[1][:, None, None, :])


def load_device_set(folder: Path, name: str, device: torch.device, eval_batch: int = 500) -> DeviceSet:
    return DeviceSet(load_set(folder, name), device, eval_batch)


class _Draws(NamedTuple):
    order: torch.Tensor
    tables: Dict[str, torch.Tensor]


@lru_cache(maxsize=256)  # the arms of a seed share it
def draw_epoch(seed: int, epoch: int, images: int, steps: int, batch: int, size: int) -> _Draws:
    """Return an epoch's order of the images and what is drawn per image, (steps, batch) each. They depend on nothing
    but the arguments.
    """
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    order = torch.randperm(images, generator=generator)[:steps * batch].view(steps, batch)

    def draw(high: int) -> torch.Tensor:
        return torch.randint(high, (steps, batch), generator=generator)

    tables = dict(y=draw(2 * PAD + 1), x=draw(2 * PAD + 1), flip=draw(2), cut_y=draw(size), cut_x=draw(size),
                  share=torch.rand((steps, 1), generator=generator).expand(steps, batch))
    return _Draws(order, tables)


class EpochBuffers:
    """Buffers of one trial's epoch on the device, and the index of its next step. Their addresses stay.

    Args:
        data: The images.
        steps: Steps per epoch.
        batch: Images per step.
    """

    def __init__(self, data: DeviceSet, steps: int, batch: int):
        self.data, self.steps, self.batch = data, steps, batch
        device = data.train.device
        drawn = draw_epoch(0, 0, len(data.train), steps, batch, data.size)
        self.order = drawn.order.to(device, copy=True)
        self.tables = {name: table.contiguous().to(device, copy=True) for name, table in drawn.tables.items()}
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self._classes = torch.arange(data.classes, device=device)

    def fill(self, seed: int, epoch: int) -> None:
        """Set the epoch's order and draws, and go to its first step."""
        drawn = draw_epoch(seed, epoch, len(self.data.train), self.steps, self.batch, self.data.size)
        self.order.copy_(drawn.order)
        for name, table in self.tables.items():
            table.copy_(drawn.tables[name])
        self.step.zero_()

    @property
    def index(self) -> torch.Tensor:
        """Which images the next step has, (B,)."""
        return self.order.index_select(0, self.step)[0]

    def next(self, strong: bool = False) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return images and labels of the next step; with strong augmentation, soft targets (B, K)."""
        index = self.index
        draws = {name: table.index_select(0, self.step)[0] for name, table in self.tables.items()}
        self.step.add_(1)
        images, labels = self.data.crop(index, draws), self.data.labels.index_select(0, index)
        if not strong:
            return images, labels
        images = self.data.cut(images, draws)
        share = draws['share'].view(-1, 1)
        targets = (labels.view(-1, 1) == self._classes).float()
        targets = share * targets + (1 - share) * targets.flip(0)
        share = share.view(-1, 1, 1, 1)
        return share * images + (1 - share) * images.flip(0), targets
