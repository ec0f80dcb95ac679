"""Policies as pure logic."""
