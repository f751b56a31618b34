"""`python -m jaxspeed`."""

import sys

from jaxspeed.cli import main

sys.exit(main())
