"""Read features from a model: list its stages, find the modules that return them, read them by methods or by hooks."""
from .finding import find_taps, named_taps, run_probe, tap_shapes
from .membranes import MembraneRecorder
from .rates import RateRecorder
from .reader import FeatureReader
from .recorder import Recorder
from .stages import POOLED, match_by_depth, stage_indices, stage_names
from .tap import Tap, fold_feature

__all__ = [
    'FeatureReader', 'MembraneRecorder', 'POOLED', 'RateRecorder', 'Recorder', 'Tap', 'find_taps', 'fold_feature',
    'match_by_depth', 'named_taps', 'run_probe', 'stage_indices', 'stage_names', 'tap_shapes',
]
