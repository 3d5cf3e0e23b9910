"""Rollouts: what the student answers, by an engine of its own behind one protocol."""
