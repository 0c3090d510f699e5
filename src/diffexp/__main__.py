"""``python -m diffexp``."""

from diffexp.cli import main

main()
