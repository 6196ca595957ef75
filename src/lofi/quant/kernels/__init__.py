"""What multiplies by quantized weights, and where: native code on CPUs, Triton on GPUs, plain torch everywhere.

`dispatch.py` is the only place that chooses. Every backend has the methods of `interface.Kernels`; `reference.py` is
the one in plain torch that the others are tested against.
"""
