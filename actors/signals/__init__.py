"""Reduction of logits to signals, on the device that computed them."""
