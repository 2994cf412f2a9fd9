"""Tensors by name: interpolation, averages, regularisation. Knows no file and no CLIP."""
