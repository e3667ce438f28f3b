"""Loops that numba compiles, on the threads that torch computes with."""
