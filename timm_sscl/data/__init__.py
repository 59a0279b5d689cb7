from .cifar import CIFAR_POLICY, augment_cifar
from .digits import DigitsDataset
from .factory import create_dataset
