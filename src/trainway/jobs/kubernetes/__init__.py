"""Jobs on Kubernetes: manifests as data, the verbs through the official client, manifests for other tools."""
