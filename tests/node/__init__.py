"""Tests on real nodes: kubelet, containerd, runc and containers, with the agent between them and simulated GPUs."""
