"""`python -m visparse.cli`: the same as the `visparse` command."""

import sys

from visparse.cli import main

sys.exit(main())
