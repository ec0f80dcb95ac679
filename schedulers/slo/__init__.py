"""Latency targets for each request: order, chunk size, admission and skipped decodes from one plan a step.

The sources are SLOs-Serve (arXiv 2504.08784) and PolyServe (arXiv 2507.17769); every file says which part it
takes from where, and what it does differently.
"""
