"""Serving: many adapters over one base in one batch, by an engine that knows no HTTP and an app that knows no tensors.

request (what is asked, what comes back) -> store (which adapters there are) -> engine (steps) -> app (HTTP, page)
"""
