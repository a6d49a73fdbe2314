"""`python -m gsa`: the command line without an installed script."""

import sys

from gsa.cli import main

sys.exit(main())
