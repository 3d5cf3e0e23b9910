"""Copies in object storage: a run while it trains, a release, the data; every byte verified."""
