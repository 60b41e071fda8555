"""The planner: what a layout of a run will take in memory, time and money, and which layout is best."""
