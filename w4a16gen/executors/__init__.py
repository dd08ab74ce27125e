"""Where slow work runs: this process, the GPUs of this machine, or a Ray cluster, behind one interface."""
