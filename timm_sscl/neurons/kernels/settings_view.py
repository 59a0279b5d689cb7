"""SettingsView: a neuron's settings of which some are replaced while a kernel runs."""
from typing import Any

__all__ = ['SettingsView']


class SettingsView:
    """A neuron's settings. A subclass replaces what it defines, usually `spike`; all else is that of the settings.

    Args:
        settings: Settings of a neuron, or another view of them.
    """

    def __init__(self, settings: Any):
        self.settings = settings

    def __getattr__(self, name: str) -> Any:
        return getattr(self.settings, name)
