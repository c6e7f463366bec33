"""`python -m gptj_dist` is `gptj-dist`."""

from gptj_dist.cli import main

main()
