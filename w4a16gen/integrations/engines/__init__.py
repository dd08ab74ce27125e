"""What the plug-ins of all serving engines share: which layers are served, how they are packed, how they are called."""
