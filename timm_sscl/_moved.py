"""Keep the module names of version 0.1.0 working: an import warns and returns the new module, and old pickles load."""
import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from types import ModuleType
from typing import Any, Callable, Optional

__all__ = ['install']

# old name -> new name, both below timm_sscl
MOVED = {
    'adapters': 'conversion.finding.hidden_activations',
    'ann': 'conversion.from_ann.thresholds',
    'batch_axis': 'conversion.over_time.batch_axis',
    'calibrate': 'conversion.scales.gains',
    'checkpoint': 'training.saving.checkpoint',
    'convert': 'conversion',
    'fold': 'conversion.scales.gain_folding',
    'frames_ann': 'distillation.frames_ann',
    'functional': 'conversion.finding.functional_calls',
    'options': 'training.command_line.options',
    'policy': 'conversion.finding.policy',
    'progress': 'training.steps.progress',
    'registry': 'models.spiking',
    'representation': 'report.representation',
    'similarity': 'losses.cka',
    'spiking': 'conversion.model',
    'sscl': 'distillation.sscl',
    'stem': 'conversion.variants.shared_stem',
    'stem_pool': 'conversion.variants.stem_pool',
    'stochastic': 'conversion.over_time.dropout',
    'stop': 'training.steps.stop',
    'taps': 'features',
    'task': 'distillation.task',
    'tdbn': 'conversion.variants.tdbn',
    'teacher_cache': 'training.teachers.teacher_cache',
    'teacher_input': 'distillation.teacher_input',
    'losses.factory': 'losses.registry',
    'losses.kd_step': 'losses.kd',
    'losses.nce': 'losses.critics',
    'losses.step': 'losses.inputs',
    'neurons.backend': 'neurons.kernels.backend',
    'neurons.flat': 'neurons.kernels.memory_layout',
    'neurons.norm_source': 'neurons.kernels.batch_norm_recompute',
    'neurons.packing': 'neurons.kernels.packing',
    'neurons.rates': 'features.rates',
    'neurons.recursion': 'neurons.kernels.recursion',
    'report.conversion': 'conversion.report',
    'report.rows': 'training.runs.rows',
}


# package -> {name: package that has it now}, all below timm_sscl
MOVED_NAMES = {'report': {'SpikingReport': 'conversion'}}


class _Alias(importlib.abc.Loader):
    """Load an old module name as the new module object, so that each class is the same under both names."""

    def __init__(self, old: str, new: str):
        self.old, self.new = old, new

    def create_module(self, spec: Any) -> ModuleType:
        warnings.warn(f'{self.old} is {self.new} now; the old name goes with version 0.3.', DeprecationWarning,
                      stacklevel=2)
        self.module = importlib.import_module(self.new)
        self.state = self.module.__spec__, self.module.__loader__, self.module.__package__
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has written the old name's spec into the module; write its own back.
        module.__spec__, module.__loader__, module.__package__ = self.state


class _Finder(importlib.abc.MetaPathFinder):
    """Find modules of version 0.1.0 by their old names."""
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Optional[Any]:
        package, _, old = fullname.partition('.')
        if package != __package__ or old not in MOVED:
            return None
        return importlib.util.spec_from_loader(fullname, _Alias(fullname, f'{package}.{MOVED[old]}'))


def _old_names(package: str) -> Callable[[str], Any]:
    """Create a module's __getattr__ that finds names that moved out of it, with a warning."""
    def find(name: str) -> Any:
        if name not in MOVED_NAMES[package]:
            raise AttributeError(f"module '{__package__}.{package}' has no attribute '{name}'")
        new = f'{__package__}.{MOVED_NAMES[package][name]}'
        warnings.warn(f'{__package__}.{package}.{name} is {new}.{name} now; the old name goes with version 0.3.',
                      DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(new), name)
    return find


def install() -> None:
    """Make the old names importable. A file that has an old name takes precedence over the alias."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
    # timm_sscl.calibrate is also a function. Importing the old module of that name later would replace the function.
    sys.modules.setdefault(f'{__package__}.calibrate', importlib.import_module(f'{__package__}.{MOVED["calibrate"]}'))
    for package in MOVED_NAMES:
        vars(importlib.import_module(f'{__package__}.{package}'))['__getattr__'] = _old_names(package)
