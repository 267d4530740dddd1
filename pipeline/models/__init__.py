"""Models: local folders, hub downloads, shipped models, tokenizers, and the compute dtype."""
