"""The agent: makes the devices of one GPU node what its GpuNode object says they should be.

One process per node (or, on simulated fleets, one process for many nodes). It observes the node's GPUs, compares
them with ``GpuNode.spec``, carries out the difference and reports into ``GpuNode.status``; beside that it is the DRA
kubelet plugin that hands devices to pods. It never decides who gets what: that is the operator's.
"""
