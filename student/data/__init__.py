"""Cached signals as a PyTorch data pipeline: dataset, batch sampler, collate function, prefetching loader."""
