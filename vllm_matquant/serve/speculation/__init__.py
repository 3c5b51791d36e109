"""A narrow slice guesses the next tokens, and the slice that is served checks them in one step: the same answers.

``settings.py`` and ``engine.py`` say what vLLM is asked for and what it cannot do then, ``proposer.py`` drafts with the
served model itself, whose layers read fewer planes meanwhile, ``sampling.py`` mends what vLLM does with sampling
parameters on CPUs, ``payoff.py`` finds out whether drafts pay.
"""
