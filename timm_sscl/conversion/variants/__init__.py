"""Options of a conversion that change more than the activation: norms, the stem's pooling, a stem that runs once."""
