"""The parts of `bench_gpu.py`, one module each, and what they share."""
