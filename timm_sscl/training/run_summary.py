"""Describe a run's best epoch on the terminal and in summary.json."""
from typing import Any, Dict, Optional

__all__ = ['best_epoch_facts', 'best_epoch_text', 'last_epoch_text']


def best_epoch_facts(
        metric: str,
        last: Dict[str, float],
        best: Optional[float],
        epoch: Optional[int],
) -> Dict[str, Any]:
    """Return the entries of summary.json on the best epoch.

    Args:
        metric: Name of the metric that ranks the epochs.
        last: Metrics of the last epoch, with `<metric>_ema` if the averaged model's metric ranks them.
        best: Value of the best epoch; None if there is none.
        epoch: Number of the best epoch, counted from 0 as in summary.csv and the checkpoints' names.
    """
    facts: Dict[str, Any] = {metric: best, 'epoch': epoch, 'epochs_count_from': 0}
    if epoch is not None:
        facts.update(weights='ema' if f'{metric}_ema' in last else 'model', checkpoint=f'checkpoint-{epoch}.pth.tar')
    return facts


def best_epoch_text(facts: Dict[str, Any], metric: str) -> str:
    """Return the text on the best epoch for the terminal, where epochs count from 1."""
    if facts['epoch'] is None:
        return ''
    model = " of the averaged model (--model-ema)" if facts['weights'] == 'ema' else ''
    return (f', best {metric}{model} {facts[metric]:.2f} (epoch {facts["epoch"] + 1}; the files count from 0: '
            f'{facts["checkpoint"]})')


def last_epoch_text(last: Dict[str, float]) -> str:
    """Return the text on the top-1 after the last epoch, of the model and of the averaged model if there is one."""
    average = f' ({last["top1_ema"]:.2f} of the averaged model)' if 'top1_ema' in last else ''
    return f'{last["top1"]:.2f} top-1 after the last epoch{average}'
