"""Training loop: optimizer steps, DDP and FSDP2, checkpoints, Ray Train."""
