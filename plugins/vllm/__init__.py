"""Thin adapters between the cores and stock vLLM."""
