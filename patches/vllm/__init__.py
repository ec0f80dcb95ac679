"""Patches to vLLM symbols."""
