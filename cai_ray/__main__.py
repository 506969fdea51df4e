"""`python -m cai_ray` is the command `cai-ray`."""

import sys

from cai_ray.cli import main

sys.exit(main())
