"""Say what timm's data sets need besides their name, before timm looks for it: torch/NAME, wds/NAME."""
import os
from typing import Optional

__all__ = ['check_source', 'how_to_download']

_INFO_FILES = '_info.json', 'info.json'  # from which timm's reader takes the .tar files of a split
_NO_DOWNLOAD = 'torch/imagenet', 'torch/image_folder', 'torch/folder'


def check_source(name: str, root: Optional[str], split: str, download: bool) -> None:
    """Check that a data set of timm has a place to read from.

    Args:
        name: Name with its prefix; '' is an image folder.
        root: Folder of the data, --data-dir.
        split: Name of the split.
        download: Whether it may be downloaded, --dataset-download.

    Raises:
        FileNotFoundError: The folder does not exist. The message says whether the data can be downloaded.
        ValueError: No folder is given, or a WebDataset's split does not name .tar files.
    """
    if name.startswith('torch/') and not root:
        raise ValueError(f"data set '{name}': --data-dir is the folder of its files{how_to_download(name)}.")
    if name.startswith('wds/'):
        _check_tar_files(name, root, split)
    if name.startswith('torch/') and not download and not os.path.exists(str(root)):
        raise FileNotFoundError(f"data folder '{root}' does not exist{how_to_download(name)}.")
    if not name and not download and not (root and os.path.exists(root)):
        raise FileNotFoundError(f"data folder '{root}' does not exist; give --data-dir the folder that holds "
                                f"{split}/ (one sub-folder per class), or leave it and --dataset out for the digits.")


def how_to_download(name: str) -> str:
    """Return the end of a message that says whether the script can download a data set: '' if it cannot."""
    downloads = name.startswith('torch/') and name not in _NO_DOWNLOAD
    return '; --dataset-download downloads them there' if downloads else ''


def _check_tar_files(name: str, root: Optional[str], split: str) -> None:
    """Raise ValueError if neither the split nor a file in the folder names the .tar files of a WebDataset."""
    if not root:
        raise ValueError(f"data set '{name}': --data-dir is the folder or address of its .tar files.")
    listed = os.path.isdir(root) and any(os.path.isfile(os.path.join(root, file)) for file in _INFO_FILES)
    remote = '://' in root or root.startswith('pipe:')
    if '.tar' not in split and '..' not in split and not listed and not remote:
        raise ValueError(
            f"split '{split}' of data set '{name}': --train-split and --val-split name its .tar files and the number "
            f"of samples, 'train-{{0000..0015}}.tar|20000', where '{root}' holds no {_INFO_FILES[0]} that lists them.")
