"""Memories that write themselves while they read: the other mixer of a block (self-modifying Titans, the Hope block).

`titans` is the module; `linear` and `deep` are what it remembers in, `bank` what these share; `chunk` is the
chunk-parallel gated delta rule, `reference` the token rule that it must equal.
"""
