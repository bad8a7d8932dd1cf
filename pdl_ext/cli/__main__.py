"""`python -m pdl_ext.cli`, the same as `pdl-ext`."""

import sys

from pdl_ext.cli.main import main

sys.exit(main())
