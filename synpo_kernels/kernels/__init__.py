"""Triton kernels: one file a kernel with its launcher, shared code in `tiles`, launch parameters in `configs`."""
