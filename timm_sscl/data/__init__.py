"""Data sets: the bundled digits, image folders, event data, registered ones. Nothing here depends on spiking."""
from .cifar import CIFAR_POLICY, augment_cifar
from .digits import DigitsDataset
from .factory import create_dataset
from .registry import list_datasets, register_dataset, unregister_dataset

__all__ = ['CIFAR_POLICY', 'DigitsDataset', 'augment_cifar', 'create_dataset', 'list_datasets', 'register_dataset',
           'unregister_dataset']
