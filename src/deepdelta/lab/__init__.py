"""The laboratory: what measures, compares and shows; only the command line knows it."""
