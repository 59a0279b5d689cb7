"""Gains of neuron inputs: measured on images, folded into weights."""
