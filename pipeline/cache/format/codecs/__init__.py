"""Codecs of a shard's binary columns: numpy arrays of one sequence to bytes and back."""

from pipeline.cache.format.codecs.mass import wrong_mass
from pipeline.cache.format.codecs.sequence import decode_sequence, encode_sequence
from pipeline.cache.format.codecs.signals import decode_signals, encode_signals

__all__ = ["decode_sequence", "decode_signals", "encode_sequence", "encode_signals", "wrong_mass"]
