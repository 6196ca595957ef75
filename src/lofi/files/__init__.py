"""Files: adapter folders, atomic writes, tensors and states on disk, the base's fingerprint, golden prompts."""
