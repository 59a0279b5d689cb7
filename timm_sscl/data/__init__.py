from .digits import DigitsDataset
from .factory import create_dataset
