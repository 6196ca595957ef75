"""Merge: a base and an adapter become one plain model, and the result is compared with what it came from."""
