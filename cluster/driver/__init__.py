"""The Ray driver: what the machine says is carried out with real processes, what they answer is told to it.

One loop, one inbox: no call of an actor blocks it.
"""
