"""Low-rank adapters on any `nn.Module`: the maths, the surgery, and the choice of which adapter speaks.

Knows torch and nothing else: no transformers, no files, no training loop. A module is adapted *in place*: its class
gains the mixin `Adapted`, its weights keep their names and their bits, and removing the adapter restores both.
Rejected: wrapper modules (they rename weights, which breaks tying, hooks and checkpoints), forward hooks (they cannot
share the input and output buffers of the base product) and `parametrize` (it forms the dense W + BA every step).
"""
