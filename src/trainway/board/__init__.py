"""The board: a live page over run directories, read-only, for this machine."""
