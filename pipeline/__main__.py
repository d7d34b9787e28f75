"""python -m pipeline is gristmill."""

from pipeline.cli import main

main()
