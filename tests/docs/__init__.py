"""The tests of README and manual, and how they read the pages."""
