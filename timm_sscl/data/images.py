"""Convert images of any bit depth and mode to 8 bits per channel."""
from typing import Any, Iterator, Tuple

import numpy as np
from PIL import Image
from timm.data import ImageDataset as TimmImageDataset

__all__ = ['ImageDataset', 'DecodedStream', 'to_mode', 'MODES']

MODES = 'L', 'RGB', 'RGBA', 'LA', 'CMYK', 'YCbCr', 'HSV', 'LAB', '1'  # 8 bits per channel, or 1

_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # TIFF tags


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image to a mode of 8 bits per channel. 16 bit grey levels are scaled; PIL would clip them.

    Args:
        image: Any PIL image.
        mode: One of `MODES`. '' only scales 16 bit images and keeps other modes.

    Raises:
        ValueError: The image holds 32 bit numbers, which have no known white level.
    """
    if image.mode.startswith('I;16') or image.mode == 'I' and image.format in ('PNG', 'PPM'):
        image = _from_16_bits(image)
    elif image.mode in ('I', 'F'):
        raise ValueError(f"mode '{image.mode}' ({image.format}): 32 bit numbers do not say which of them is white; "
                         f'save it with 8 or 16 bits per channel.')
    return image.convert(mode) if mode else image


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Scale grey levels 0 to 2^16 - 1 (TIFF: to the bit depth in its tags) to 0 to 255."""
    tags = getattr(image, 'tag_v2', {})
    bits = tags.get(_BITS_PER_SAMPLE, 16)
    white = 2 ** int(bits[0] if isinstance(bits, tuple) else bits) - 1
    levels = np.asarray(image).astype(np.int64)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        levels = white - levels
    return Image.fromarray(((levels * 255 + white // 2) // white).astype(np.uint8))


class ImageDataset(TimmImageDataset):
    """timm's data set of image files with conversion by `to_mode`. Unreadable files raise.

    Args:
        dataset: timm data set whose reader and settings are used.
    """

    def __init__(self, dataset: TimmImageDataset):
        super().__init__(
            None, reader=dataset.reader, input_img_mode=dataset.input_img_mode, transform=dataset.transform,
            target_transform=dataset.target_transform)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        file, target = self.reader[index][:2]
        with file:
            image = to_mode(Image.open(file), self.input_img_mode)
        image = image if self.transform is None else self.transform(image)
        if target is None:
            return image, -1
        return image, target if self.target_transform is None else self.target_transform(target)


class DecodedStream:
    """A timm reader that streams PIL images, with conversion by `to_mode`.

    Args:
        reader: timm reader; its own conversion is switched off.
        mode: See `to_mode`.
    """

    def __init__(self, reader: Any, mode: str):
        reader.input_img_mode = ''
        self.reader = reader
        self.mode = mode

    def __iter__(self) -> Iterator[Tuple[Image.Image, Any]]:
        for image, target in self.reader:
            yield to_mode(image, self.mode), target

    def __len__(self) -> int:
        return len(self.reader)

    def __getattr__(self, name: str) -> Any:
        if name == 'reader':  # while unpickling
            raise AttributeError(name)
        return getattr(self.reader, name)
