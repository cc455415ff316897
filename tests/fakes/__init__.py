"""Hardware that is not there, behind the same Protocols as the real one."""
