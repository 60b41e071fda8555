"""Proving on this machine that every layout computes the run of one process."""
