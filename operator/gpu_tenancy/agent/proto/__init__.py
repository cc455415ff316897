"""kubelet's wire contract with a DRA driver: two short protos and the code generated from them.

Nothing here is written by hand but the protos; ``python -m gpu_tenancy.agent.proto`` writes the rest.
"""
