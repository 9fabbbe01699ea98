"""The FUSE side: requests of the kernel in terms of LUs and commands, and back.

It translates and decides nothing: what a command means is the engines', what a map means is the
Clone Group's.
"""
