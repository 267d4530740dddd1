"""The parts of `bench_gpu.py`, one module each, and the modules that they share."""
