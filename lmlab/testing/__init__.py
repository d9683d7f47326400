"""Tiny models, brute-force enumeration and conformance tables, for our tests and for yours."""
