"""Many boxes: one engine each, behind one address, supervised and scaled by Ray Serve (extra `ray`)."""
