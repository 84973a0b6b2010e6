"""One child process per device. It computes what a frame names and decides nothing."""
