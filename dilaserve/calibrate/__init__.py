"""Measures a model on this machine and writes its profile."""
