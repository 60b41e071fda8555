"""Speed and memory, always as ratios within one run: absolute figures drift with the machine."""
