"""Weights: checkpoints of others and of ours, read, recognised, converted both ways, and written."""
