"""Atomic files on local folders and object stores, with checked Parquet and a lock."""
