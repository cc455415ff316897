"""An A100 node in a file: a libnvidia-ml.so.1 that the unmodified nvidia-ml-py loads, and a hand on what befalls it.

Facts and faults are those of NVIDIA's documents and of real boards; see src/ for the library and node.py for the hand.
"""
