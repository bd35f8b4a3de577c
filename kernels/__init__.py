"""Triton kernels, installed as `fused_attention.kernels`; always import them under that name."""
