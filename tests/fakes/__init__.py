"""Stand-ins for what tests cannot have: GPUs, their libraries, and minutes of compiling."""
