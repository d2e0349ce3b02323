"""Pairs: a pairing is a join of two stored responses to one prompt, then rules that each say what they removed."""
