"""Real nodes for the embedded control plane: kubelet, containerd and runc in namespaces of their own."""
