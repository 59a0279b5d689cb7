"""Kernels of the recursion over time: code, compilation, and what is saved for the backward."""
