"""Signals to bytes and back, one sequence at a time, in numpy alone.

To add a codec: write it in a module of this package with its precision in the docstring, give it a name and a version,
declare it in `pipeline.cache.format.schema`, and assert the precision in tests/pipeline/cache. Never change what a
released version's bytes mean.
"""

from pipeline.cache.format.codecs.mass import wrong_mass
from pipeline.cache.format.codecs.sequence import decode_sequence, encode_sequence
from pipeline.cache.format.codecs.signals import decode_signals, encode_signals

__all__ = ["decode_sequence", "decode_signals", "encode_sequence", "encode_signals", "wrong_mass"]
