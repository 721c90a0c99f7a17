"""The parts of a native transformer, one file each, whose docstring gives the formula and the config keys that choose it.

Letters: B rows, T tokens, D width (`hidden_size`), H heads, G key/value heads, E head size, F feed-forward width, V vocabulary.
"""
