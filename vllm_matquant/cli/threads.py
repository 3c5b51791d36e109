"""Importing this module, before torch, lets torch's threads sleep while they wait.

By default they spin: on a machine that does anything else they slow each other manyfold. A few turns are good: most
waits are shorter than a sleep. Whoever has set the variables keeps what they say.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
