"""Fair comparison of ways to learn a stream: equal FLOPs, equal stored bytes, one base, one process, no Ray."""
