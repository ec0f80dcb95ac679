"""Grafana dashboards, one JSON file a feature, written by ``tools/make_dashboards.py``."""
