"""Patches to SGLang symbols."""
