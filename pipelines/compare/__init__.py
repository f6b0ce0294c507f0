"""Comparisons: methods, as strategies and hooks, on the machine of a run in simulated time. Nothing here trains.

A method is a strategy with some keys changed, and perhaps a hook (methods, opponents); a trial is a simulated run
(trial), kept on disk (trials); a comparison is many of them, tuned alike (runner, widening), with an outcome (outcome,
page, figures).
"""
