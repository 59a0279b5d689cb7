"""Variants: options of a conversion that change more than the activation. Norms, residual blocks, stem pooling, shared
stem.
"""
