"""Learning in one process: what is read, stored, learned awake and asleep, judged, decided and reported.

Nothing here starts a process or knows of Ray and DeepSpeed; `cluster` decides on how many machines it happens.
"""
