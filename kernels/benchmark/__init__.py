"""The parts of ``kernels.bench``: cases, and how they are measured."""
