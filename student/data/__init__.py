"""From a cache's rows to packed micro-batches."""
