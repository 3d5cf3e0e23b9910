"""The cluster's smoke test: do these machines, GPUs and networks train together, and at what speed."""
