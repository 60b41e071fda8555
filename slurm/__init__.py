"""Slurm: submission, the job script, requeue, node health, jobs and their state. Imports no other room."""
