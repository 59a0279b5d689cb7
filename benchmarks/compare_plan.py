"""A plan of a comparison: from its file and the results so far to the trials of a phase.

A plan is a YAML file that is committed before its first run. Its name is the file's. Keys:

    question, primary, further, seeds, stopping, reported
                what compare_results.py says: the question, [arm, control] of the primary comparison and further
                pairs, planned pairs of the primary comparison, when runs end, what is reported
    defaults    fields of every trial, such as timesteps
    scales      {name: fields of `Scale`}
    arms        {arm: {label, fields of `Trial`, tries}}; tries are changes of the fields, of which phase tune chooses
    phases      {phase: options}, in this order. Options of a phase:
        arms        names, or {name: number of seeds}, or 'power' for the number that `power` gives
        seeds       number of seeds per arm where no other is given
        first_seed  first seed; fresh seeds are those of no other phase
        scale       names of scales, or 'pilot': the one with the smaller SD in phase pilot
        split       'heldout' to choose settings
        tune        run every try of the arms; later phases use the best one, by its mean on the split
        best_of     {phase: number}: further arms, the best of that phase by their mean
        within      points: only arms of phase primary that lie within so many points of the best; none if it is alone
    power       {difference, least, most}: pairs for 80 % power at the SD of the primary pair in phase pilot
"""
from dataclasses import fields
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

import numpy as np
import yaml

from compare_statistics import pairs_for_power
from trials import Scale, Trial

__all__ = ['ComparisonPlan', 'Line']

Line = Mapping[str, Any]

_OWN = {'label', 'tries', 'note'}  # keys of an arm that are no fields of a trial
_OPTIONS = {'arms', 'seeds', 'first_seed', 'scale', 'split', 'tune', 'best_of', 'within'}


class ComparisonPlan:
    """A plan's file.

    Args:
        file: The file.
        shrink: Fields of `Scale` that replace the plan's, to try a plan quickly.

    Raises:
        ValueError: A key is missing or unknown.
    """

    def __init__(self, file: Path, shrink: Optional[Mapping[str, Any]] = None):
        self.name, self.file = file.stem, file
        self.content: Dict[str, Any] = yaml.safe_load(file.read_text())
        for key in ('question', 'primary', 'seeds', 'stopping', 'reported', 'scales', 'arms', 'phases'):
            if key not in self.content:
                raise ValueError(f"{file}: a plan needs '{key}'.")
        self.scales = {name: Scale(name, **{**given, **(shrink or {})})
                       for name, given in self.content['scales'].items()}
        self.arms: Dict[str, Dict[str, Any]] = {name: given or {} for name, given in self.content['arms'].items()}
        self.phases: Dict[str, Dict[str, Any]] = self.content['phases']
        self._check()

    def _check(self) -> None:
        known = {field.name for field in fields(Trial)} | _OWN
        for name, given in self.arms.items():
            for key in [*given, *(key for change in given.get('tries', []) for key in change)]:
                if key not in known:
                    raise ValueError(f"{self.file}: arm '{name}' has '{key}', which is no field of a trial.")
        for phase, options in self.phases.items():
            for key in options:
                if key not in _OPTIONS:
                    raise ValueError(f"{self.file}: phase '{phase}' has '{key}'; there are {', '.join(_OPTIONS)}.")
            for name in options.get('arms', []):
                if name not in self.arms:
                    raise ValueError(f"{self.file}: phase '{phase}' names the arm '{name}', which the plan lacks.")

    # ---- what earlier phases decide

    def own(self, lines: Sequence[Line], phase: str) -> List[Line]:
        """Return the finished runs of a phase of this plan."""
        return [line for line in lines
                if (line['plan'], line['phase'], line['status']) == (self.name, phase, 'ok')]

    def pilot_sd(self, lines: Sequence[Line]) -> Dict[str, float]:
        """Return the SD of the paired difference by scale; nothing of the difference's sign or mean."""
        found = {}
        for scale in self.scales:
            values = [{line['seed']: line['top1'] for line in self.own(lines, 'pilot')
                       if line['arm'] == arm and line['scale']['name'] == scale} for arm in self.content['primary']]
            pairs = [values[0][seed] - values[1][seed] for seed in values[0] if seed in values[1]]
            if len(pairs) > 1:
                found[scale] = float(np.std(pairs, ddof=1))
        return found

    def _scales(self, option: Any, lines: Sequence[Line]) -> List[Scale]:
        if option is None:
            return [next(iter(self.scales.values()))]
        if option != 'pilot':
            return [self.scales[name] for name in ([option] if isinstance(option, str) else option)]
        spread = self.pilot_sd(lines)
        if not spread:
            raise ValueError(f'{self.name}: the scale follows from phase pilot, of which no pair is done.')
        return [self.scales[min(spread, key=lambda name: spread[name])]]

    def pairs(self, lines: Sequence[Line]) -> int:
        """Return the number of pairs that the plan's power needs at the SD of the chosen scale."""
        power, spread = self.content['power'], min(self.pilot_sd(lines).values())
        return int(np.clip(pairs_for_power(max(spread, 1e-3), power['difference']), power['least'], power['most']))

    def best_try(self, arm: str, lines: Sequence[Line]) -> int:
        """Return the number of the arm's try with the best mean in phase tune; the first where none was run."""
        means: Dict[int, List[float]] = {}
        for line in self.own(lines, 'tune'):
            if line['arm'] == arm:
                means.setdefault(line['config'], []).append(line['top1'])
        return max(sorted(means), key=lambda i: float(np.mean(means[i])), default=0)

    def ranking(self, lines: Sequence[Line], phase: str) -> Dict[str, float]:
        """Return the mean accuracy of a phase's arms, the best first."""
        values: Dict[str, List[float]] = {}
        for line in self.own(lines, phase):
            values.setdefault(line['arm'], []).append(line['top1'])
        means = {arm: float(np.mean(of)) for arm, of in values.items()}
        return dict(sorted(means.items(), key=lambda item: -item[1]))

    def _arms(self, options: Mapping[str, Any], lines: Sequence[Line]) -> Dict[str, int]:
        """Return the number of seeds of every arm of a phase."""
        seeds, given = options.get('seeds', 0), options.get('arms', {})
        arms = dict(given) if isinstance(given, Mapping) else dict.fromkeys(given, seeds)
        for phase, count in options.get('best_of', {}).items():
            arms.update(dict.fromkeys(list(self.ranking(lines, phase))[:count], seeds))
        if 'within' in options:
            means = self.ranking(lines, 'primary')
            near = [arm for arm, mean in means.items() if mean >= max(means.values()) - options['within']]
            arms = dict.fromkeys(near if len(near) > 1 else [], seeds)
        return {arm: self.pairs(lines) if count == 'power' else int(count) for arm, count in arms.items()}

    # ---- trials

    def trials(self, phase: str, lines: Sequence[Line]) -> List[Trial]:
        """Return the trials of a phase, ordered by seed, so that finished ones are paired.

        Args:
            phase: Name of the phase.
            lines: Results so far.
        """
        options = self.phases[phase]
        found = []
        for scale in self._scales(options.get('scale'), lines):
            for arm, count in self._arms(options, lines).items():
                for seed in range(options['first_seed'], options['first_seed'] + count):
                    found += self._configurations(phase, options, arm, seed, scale, lines)
        return sorted(found, key=lambda trial: trial.seed)

    def _configurations(
            self, phase: str, options: Mapping[str, Any], arm: str, seed: int, scale: Scale, lines: Sequence[Line],
    ) -> List[Trial]:
        """Return the trials of one arm and seed: one, or one per try."""
        given = {key: value for key, value in self.arms[arm].items() if key not in _OWN}
        tries = self.arms[arm].get('tries', [{}])
        numbers = range(len(tries)) if options.get('tune') else [self.best_try(arm, lines)]
        common = {**self.content.get('defaults', {}), 'split': options.get('split', 'validation')}
        return [Trial(plan=self.name, phase=phase, arm=arm, seed=seed, scale=scale, config=i,
                      **merged(merged(common, given), tries[i])) for i in numbers]


def merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> Dict[str, Any]:
    """Return a mapping with the values of both; the second's win, and mappings are merged."""
    result = dict(one)
    for key, value in other.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else value
    return result
