"""Which kernel a call gets, and why."""
