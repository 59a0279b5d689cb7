from .nce import info_nce_loss, mi_lower_bound, nce_loss
