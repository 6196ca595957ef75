"""The only room that knows transformers' models: loading, architecture facts, their own loss, packing, dtypes.

It does not know adapters' mathematics, data, files or training. Rejected: a list of supported architectures; what a
model can do is found out by asking it (a probe of a few tokens), so a new architecture needs no new line here.
"""
