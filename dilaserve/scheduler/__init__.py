"""Decides which requests run where and when. It remembers, and has no clock and no device."""
