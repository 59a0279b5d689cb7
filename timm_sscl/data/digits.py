"""scikit-learn's handwritten digits as an image data set, bundled, without a download."""
from typing import Any, Callable, List, Optional, Tuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

__all__ = ['DigitsDataset', 'digits_split']

_SPLITS = {'train': 0, 'training': 0, 'validation': 1, 'val': 1, 'test': 1}
_VALIDATION_IMAGES = 360


def digits_split(split: str, num_samples: Optional[int] = None) -> Tuple[Any, np.ndarray]:
    """Return scikit-learn's digits and the indices of a split: 1,437 training and 360 validation images, stratified.

    Raises:
        ValueError: The split does not exist.
    """
    if split not in _SPLITS:
        raise ValueError(f"split '{split}': the digits have 'train' and 'validation'.")
    from sklearn.datasets import load_digits  # a second to import, which other data need not take
    from sklearn.model_selection import train_test_split
    digits = load_digits()
    indices = train_test_split(
        np.arange(len(digits.target)), test_size=_VALIDATION_IMAGES, random_state=0, stratify=digits.target)
    return digits, indices[_SPLITS[split]][:num_samples]


class DigitsDataset(Dataset):
    """1,797 scans of handwritten digits, 8 x 8 with 17 grey levels (Alpaydin and Kaynak 1998), resized to 32 x 32.

    The split is fixed and stratified: 1,437 training and 360 validation images. timm's create_loader sets `transform`.

    Args:
        split: 'train' or 'validation'.
        num_samples: Number of images to take; None takes all.
        transform: Applied to the PIL image.
        input_img_mode: PIL mode of the images.

    Raises:
        ValueError: The split does not exist.
    """

    def __init__(
            self,
            split: str = 'train',
            num_samples: Optional[int] = None,
            transform: Optional[Callable] = None,
            input_img_mode: str = 'RGB',
    ):
        digits, chosen = digits_split(split, num_samples)
        self.images: List[Image.Image] = [_to_image(digits.images[i], input_img_mode) for i in chosen]
        self.targets: List[int] = [int(t) for t in digits.target[chosen]]
        self.classes = [str(name) for name in digits.target_names]
        self.transform = transform

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        image = self.images[index]
        return (self.transform(image) if self.transform is not None else image), self.targets[index]

    def __len__(self) -> int:
        return len(self.images)


def _to_image(scan: np.ndarray, mode: str) -> Image.Image:
    grey = Image.fromarray(np.round(scan * (255 / 16)).astype(np.uint8))
    return grey.resize((32, 32), Image.Resampling.BICUBIC).convert(mode)
