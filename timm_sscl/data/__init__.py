"""Data sets: the bundled digits, images, event data, your own; this room knows nothing of spiking."""
from .cifar import CIFAR_POLICY, augment_cifar
from .digits import DigitsDataset
from .factory import create_dataset
from .registry import list_datasets, register_dataset, unregister_dataset

__all__ = ['CIFAR_POLICY', 'DigitsDataset', 'augment_cifar', 'create_dataset', 'list_datasets', 'register_dataset',
           'unregister_dataset']
