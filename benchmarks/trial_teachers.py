"""The teachers of trials: ANNs that are trained once for an output, in files."""
from dataclasses import replace
from pathlib import Path
from typing import Callable, Dict, Optional, Sequence, Set, Tuple

import torch
import torch.nn as nn

from trial_data import DeviceSet
from trial_models import teacher_model
from trials import Trial

__all__ = ['Teachers', 'teacher_trial']


def teacher_trial(trial: Trial) -> Trial:
    """Return the trial that trains the teacher of a trial."""
    scale = replace(trial.scale, epochs=trial.scale.teacher_epochs)
    return Trial('teachers', 'teacher', 'ann' if trial.teacher == 'same' else f'ann_{trial.teacher}', 0, 0, scale,
                 arch=trial.arch, teacher=trial.teacher)


class Teachers:
    """Trained teachers, each loaded once.

    Args:
        folder: Folder of their files.
        images: Return a set of images on the device by its name.
    """

    def __init__(self, folder: Path, images: Callable[[str], DeviceSet]):
        self.folder, self.images = folder, images
        self.models: Dict[Tuple[str, bool], nn.Module] = {}
        self.accuracies: Dict[Tuple[str, str, bool], float] = {}

    def file(self, trial: Trial) -> Path:
        """Return the file of a teacher, given the trial that trains it."""
        return self.folder / f'{trial.name}.pt'

    def save(self, trial: Trial, model: nn.Module) -> None:
        """Store a teacher at once, so that an interrupted process leaves no part of it."""
        file = self.file(trial)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix('.part')
        torch.save(model.state_dict(), part)
        part.rename(file)

    def missing(self, trials: Sequence[Trial]) -> Sequence[Trial]:
        """Return the trials of the teachers that these trials need and that are not there."""
        needed: Set[Trial] = {teacher_trial(t) for t in trials if t.teacher and t.losses and t.timesteps}
        return sorted((t for t in needed if not self.file(t).is_file()), key=lambda t: t.name)

    def load(self, trial: Trial, bfloat16: bool) -> Optional[nn.Module]:
        """Return the trained teacher of a trial; None if none of its losses can use one.

        Args:
            trial: The trial.
            bfloat16: Whether its forwards run in bfloat16; then the teacher is channels_last.
        """
        if not trial.teacher or not trial.timesteps or not trial.losses:
            return None
        teacher = teacher_trial(trial)
        key = teacher.name, bfloat16
        if key not in self.models:
            data = self.images(trial.scale.data)
            model = teacher_model(trial, data.classes)
            model.load_state_dict(torch.load(self.file(teacher), map_location='cpu', weights_only=True))
            model = model.to(memory_format=torch.channels_last) if bfloat16 else model
            self.models[key] = model.to(data.train.device).eval()
        return self.models[key]

    @torch.no_grad()
    def top1(self, trial: Trial, bfloat16: bool) -> Optional[float]:
        """Return the accuracy of a trial's teacher on the trial's split."""
        teacher = self.load(trial, bfloat16)
        if teacher is None:
            return None
        key = teacher_trial(trial).name, trial.split, bfloat16
        if key not in self.accuracies:
            data = self.images(trial.scale.data)
            batches = zip(*(x.split(data.eval_batch) for x in data.evaluated[trial.split]))
            with torch.autocast(data.train.device.type, torch.bfloat16, enabled=bfloat16):
                right = torch.cat([teacher(data.normalise(x)).argmax(1) == y for x, y in batches])
            self.accuracies[key] = 100 * right[:data.sizes[trial.split]].float().mean().item()
        return self.accuracies[key]
