"""Integrations of other frameworks, one file each. Each file needs its framework; no other module imports it."""
