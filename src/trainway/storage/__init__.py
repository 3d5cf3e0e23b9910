"""Files on object storage: copied while a run goes on, verified by their hashes."""
