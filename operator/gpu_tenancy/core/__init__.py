"""The decisions: pure functions of an immutable Snapshot and a time. No I/O, no clock, no kopf, no kubernetes."""
