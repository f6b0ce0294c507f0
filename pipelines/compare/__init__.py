"""Strategies and opponents on simulated runs, at equal FLOPs and stored bytes: trials, tuning, statistics, pages."""
