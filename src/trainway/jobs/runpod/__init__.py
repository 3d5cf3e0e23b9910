"""Jobs on RunPod: its REST API v2, pods and clusters, what they cost, and how every one of them is ended."""
