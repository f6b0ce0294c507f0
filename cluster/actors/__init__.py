"""The actors of a run, plain classes that are never restarted behind our back, and how they are started."""
