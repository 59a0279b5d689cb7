"""Find what becomes a neuron: modules, functions, and activations hidden in layers."""
