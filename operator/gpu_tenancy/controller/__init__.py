"""The operator process: gather → plan → execute → report. All I/O of the operator and none of its decisions."""
