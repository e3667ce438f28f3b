"""Fused code by device: `cpu/` by numba, `cuda/` by Triton. Only the interfaces of ops import it, when it runs."""
