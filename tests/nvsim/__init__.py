"""An A100 node in a file: libnvidia-ml.so.1, libcuda.so.1 and nvidia-smi for unmodified programs, and a hand on it.

Facts and faults are those of NVIDIA's documents and of real boards. src/ is the driver, node.py the hand on what
befalls the node, files.py and cdi.py what the driver shows of itself to the system and to containers; for people the
hand is `python -m tests.nvsim`.
"""
