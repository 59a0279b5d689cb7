"""Time folded into the batch: inputs repeated or encoded, outputs decoded, one dropout mask over time."""
