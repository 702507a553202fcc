"""Kernels beyond PyTorch's operators."""
