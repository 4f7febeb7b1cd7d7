"""Measurements beside diffusers: the same weights on both sides, in turns, in one run.

    python -m benchmarks.unet           one UNet call and one training step
    python -m benchmarks.sampling       from a prompt to four pictures
    python -m benchmarks.controlnet     what a ControlNet adds to a step
    python -m benchmarks.autoencoder    what the first stage keeps of held-out pictures

Each prints one table in Markdown and writes one JSON file, by default below `outputs/benchmarks`; `--quick`
only shows that it runs. They are run from a checkout, with the extra `test` installed. Nothing here is
imported by the packages.
"""
