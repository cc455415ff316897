"""The adapter to the Kubernetes API that operator and agent share; nothing else speaks to an API server."""
