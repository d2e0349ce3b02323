"""Exploration: trials over pairings, deltas and training settings on Ray Tune, and the delta landscape."""
