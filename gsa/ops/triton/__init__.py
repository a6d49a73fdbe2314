"""Triton kernels of the operator. Importing this package imports torch only.

The kernel modules import triton; they are loaded when a kernel is first called.
"""
