"""`python -m allfuse` is `allfuse`."""

from allfuse.cli import main

main()
