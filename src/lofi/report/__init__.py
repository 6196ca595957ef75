"""The report: one HTML page that says what a run did, with nothing loaded from outside.

Knows  a run folder's recipe.yaml, metrics.jsonl and chosen.json, and the rows it is given. Knows not  torch or models.
Rejected  matplotlib for the curve: its SVG carries fixed colours (no dark page) and costs a second of import.
"""
