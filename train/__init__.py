"""The command line, the run's configuration, the loop, and everything that listens to it."""
