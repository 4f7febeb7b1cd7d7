"""Training: one open loop (`loop.py`) and a task for each kind of model (`tasks/`). `python -m train TASK
CONFIG`."""
