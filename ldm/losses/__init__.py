"""Losses of the autoencoder: reconstruction, perceptual distance, adversarial term."""
