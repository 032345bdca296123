"""`python -m flashmorph`, the same as `flashmorph`."""

from flashmorph.cli import main

main()
