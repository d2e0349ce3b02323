"""Verbs as Ray jobs on a remote cluster."""
