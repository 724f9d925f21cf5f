"""Triton kernels, one op per file; installed as `knnfast.kernels`."""
