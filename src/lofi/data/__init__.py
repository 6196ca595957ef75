"""Text becomes tokens with labels: records, the text format, labels, batches, and a view of which token is trained.

Importing this room loads neither torch nor transformers; `lofi.data.batches` alone needs torch, and imports it.
"""

from __future__ import annotations
