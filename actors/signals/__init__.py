"""Logits and hidden states become signals, on the device that has them."""
