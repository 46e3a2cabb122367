"""Set-up of every test process."""

from __future__ import annotations

import os

from hypothesis import settings

# Tests run in one process for each core: threads of numpy's products on top of that wait for each other.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")

# A machine that is busy with something else is no failure.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")
