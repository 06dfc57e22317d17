"""The ops' Triton kernels, one module an op, imported when one first runs on a GPU: Triton need not be installed."""
