"""Several slices of a checkpoint in one server: one of them active, and each request at the one that it asks for.

``offer.py`` says which slices there are and who may ask for them, ``rows.py`` which of them each row of a step is
computed with, ``requests.py`` gives each request its slice when it arrives, ``worker.py`` and ``switch.py`` change the
active one in all processes, ``api.py``, ``metrics.py`` and ``control.py`` are what a server shows of it, ``policy.py``
lets it follow the load.
"""
