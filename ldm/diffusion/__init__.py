"""Diffusion mathematics: noise schedule, forward process, training loss, denoiser, guidance and samplers."""
