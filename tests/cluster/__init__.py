"""The embedded control plane: a whole Kubernetes API on this machine, for tests, the demo and the benchmarks.

Nothing of Kubernetes is mocked here: the programs are the real ones, built once from pinned Go modules. The package
knows nothing of gpu-tenancy but its driver name and its annotations; kubelet.py and plugins.py import the
messages of kubelet's plugin protocol and the driver's name from gpu_tenancy, and nothing else may.
"""
