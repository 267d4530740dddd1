"""The training loop: steps, optimizer, parallelism, checkpoints, Ray Train."""
