"""Latent diffusion: configurations, models, mathematics of diffusion, losses, and weights of others."""
