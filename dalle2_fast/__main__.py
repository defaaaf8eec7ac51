"""`python -m dalle2_fast ...` is `dalle2-fast ...`."""

import sys

from dalle2_fast.cli import main

sys.exit(main())
