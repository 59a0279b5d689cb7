"""Event data: recordings, file readers, frames."""
from .aedat import read_aedat
from .camera import simulate_events
from .dataset import EventDataset
from .digits import EventDigits
from .factory import create_event_dataset, is_event_dataset
from .folder import EventFolder
from .frames import FrameSettings, resize_frames, to_frames
from .loader import create_event_loader
from .npz import read_npz
from .recording import DamagedEventFile, Events
from .tonic_data import TonicDataset
from .transforms import EventAugment

__all__ = [
    'DamagedEventFile', 'EventAugment', 'EventDataset', 'EventDigits', 'EventFolder', 'Events', 'FrameSettings',
    'TonicDataset', 'create_event_dataset', 'create_event_loader', 'is_event_dataset', 'read_aedat', 'read_npz',
    'resize_frames', 'simulate_events', 'to_frames',
]
