"""The company in a box: a trace of leases lived through on a described cluster, by the product's own planner.

Nothing here decides anything: `core.planner.plan` does, on a virtual clock. `run` reads files and prints; the rest is
pure.
"""
