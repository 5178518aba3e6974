"""Triton twins of the functions of the same names in attention.py, which calls them where
`attention.choose` says so."""

from kernels.attention import attention, joint_attention
from kernels.rows import add_gated, norm_modulate, norm_rotate

__all__ = ["add_gated", "attention", "joint_attention", "norm_modulate", "norm_rotate"]
