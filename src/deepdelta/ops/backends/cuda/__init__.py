"""Kernels that Triton compiles."""
