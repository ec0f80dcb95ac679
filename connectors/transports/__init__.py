"""Byte movers: NIXL for production, loopback for tests, and a fault-scripting decorator."""
