"""`python -m hpcguard STAGE ...` is the same as `hpcguard STAGE ...`."""

import sys

from hpcguard.cli import main

sys.exit(main())
