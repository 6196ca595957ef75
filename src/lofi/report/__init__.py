"""The report: one HTML page that says what a run did, with nothing loaded from outside; and what an adapter is made of.

Knows  what a run folder holds, and the rows it is given. Knows not  how to train or measure. torch loads where used.
Rejected  matplotlib for the curve: its SVG carries fixed colours (no dark page) and costs a second of import.
"""
