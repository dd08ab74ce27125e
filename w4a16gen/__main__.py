"""`python -m w4a16gen`, the same as the command `w4a16gen`."""

from w4a16gen.cli import main

main()
