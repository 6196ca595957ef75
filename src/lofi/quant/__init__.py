"""Quantized weights: what the codes mean, the frozen linears that hold them, and the kernels that multiply by them.

Torch only. `nf4.py` and `int8.py` are the reference in plain torch, the executable spec of every kernel; `linear.py`
has the modules; `kernels/` chooses what runs where. Does not know transformers, files or training. On disk the tensors
are bitsandbytes' own (models/bitsandbytes_format.py).
"""
