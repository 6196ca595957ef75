"""Studies: one grid of runs under one protocol, and what it says about which method to take.

Knows how to plan, run, resume, compare and show. How one run trains is `lofi.train`'s affair, how it is judged is
`lofi.evaluate`'s.
"""
