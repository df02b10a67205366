"""Faults on purpose: processes are killed and stopped, connections slowed, cut, silenced and corrupted."""
