"""Thresholds and spikes from a trained ANN."""
