"""Requests in, streams of text out: the engine has the clock, and knows no device."""
