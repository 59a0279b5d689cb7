"""Threshold rules: how convert_ann and calibrate find the threshold of a neuron layer on real images."""
from . import ltb as _ltb, percentile as _percentile, spike_norm as _spike_norm  # noqa: F401, they register themselves
from .base import ThresholdRule, list_threshold_rules, register_threshold_rule, rule_maker, unregister_threshold_rule

__all__ = ['ThresholdRule', 'list_threshold_rules', 'register_threshold_rule', 'rule_maker',
           'unregister_threshold_rule']
