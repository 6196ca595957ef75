"""Speed and memory claims, one file each: `python -m bench NAME`, or `make bench` for all of them.

A claim is a ratio of two sides measured side by side in one process, A B A B ..., after both were warmed up; what is
reported is the median of the per-round ratios with a 95 % bootstrap interval. Nothing here is a test.
"""
