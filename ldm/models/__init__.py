"""Networks: UNet, autoencoders, text towers, ControlNet, LoRA, and what is done to them while they sample."""
